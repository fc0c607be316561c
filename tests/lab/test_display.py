"""Progress: live on a terminal, lines elsewhere."""

import io

from rich.console import Console

from sao_prune.lab.display import LiveDisplay, PlainDisplay, make_display


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
