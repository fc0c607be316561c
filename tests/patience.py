"""How long tests wait for other processes."""

# Seconds after which one counts as hung. Not how long anything takes: on a busy machine that is many times longer.
PATIENCE = 900.0
