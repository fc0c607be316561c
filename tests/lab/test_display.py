"""Progress: live on a terminal, lines elsewhere."""

import io

from rich.console import Console

from sao_prune.lab.display import LiveDisplay, MethodProgress, PlainDisplay, make_display


def test_the_console_decides() -> None:
    assert isinstance(make_display(Console(file=io.StringIO())), PlainDisplay)
    assert isinstance(make_display(Console(file=io.StringIO(), force_terminal=True)), LiveDisplay)


def test_both_show_progress_and_notes_and_take_brackets_as_text() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=160)
        display = LiveDisplay(console) if terminal else PlainDisplay(console, every=0)
        with display:
            display.start(4, 0)
            display.step("SAO [bold]", "epoch 1/2", 2)
            display.note("SAO [x]: 90 %")
        assert "SAO [bold]" in out.getvalue()
        assert "SAO [x]: 90 %" in out.getvalue()
        assert ("50%" if terminal else "2/4 steps") in out.getvalue()


def test_what_comes_before_the_steps_is_shown() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        with make_display(Console(file=out, force_terminal=terminal, width=160)) as display:
            display.stage("importing [torch]")
        assert "importing [torch]" in out.getvalue()


METHODS = [
    MethodProgress("Dense", 4, 0, 0, 0.5, 0.8125),
    MethodProgress("SAO [x]", 1, 2, 1, 0.25),
    MethodProgress("GMP-S", 0, 0, 4),
]


def test_the_live_view_shows_trials_and_the_best_accuracy_of_every_method() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120, height=40)
    with LiveDisplay(console) as display:
        display.start(8, 2)
        display.methods(METHODS)
    shown = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["Dense", "4", "-", "-", "50.00", "81.25"] in shown
    assert ["SAO", "[x]", "1", "2", "1", "25.00", "-"] in shown
    assert ["GMP-S", "0", "-", "4", "-", "-"] in shown
    assert "trials: 5 done, 2 running, 5 left" in console.file.getvalue()


def test_a_low_terminal_shows_the_methods_at_work() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120, height=9)
    with LiveDisplay(console) as display:
        display.methods(METHODS)
    shown = console.file.getvalue()
    assert "SAO [x]" in shown
    assert "Dense" not in shown
    assert "2 more methods" in shown


def test_plain_lines_tell_of_trials_and_the_time_left() -> None:
    out = io.StringIO()
    display = PlainDisplay(Console(file=out, width=160), every=0)
    display.start(8, 2)
    display.methods(METHODS)
    display.step("SAO", "epoch 1/2")
    assert "3/8 steps, trials: 5 done, 2 running, 5 left, about 0:00:00 left; SAO: epoch 1/2" in out.getvalue()
