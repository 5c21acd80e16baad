"""Being asked to stop: where a signal ends the program at once, and where it waits for the step."""

import os
import signal
import subprocess
import sys

import pytest

from cfssl.engine.interruption import SIGNALS, Interrupted, Interruption


def ask(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.sigpending()  # the handler has run when this returns


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_program_where_it_happens_to_be(number: int) -> None:
    with Interruption().listening() as interruption:
        with pytest.raises(Interrupted, match=signal.Signals(number).name) as caught:
            ask(number)
        assert caught.value.number == interruption.number == number
        with pytest.raises(Interrupted):
            interruption.check()


def test_signals_go_back_to_whom_they_belonged() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption().listening():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_deferred_signal_waits_until_it_is_asked_for_and_a_second_ctrl_c_does_not() -> None:
    with Interruption().listening() as interruption:
        interruption.check()
        with interruption.deferred():
            for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2):
                ask(number)
            assert interruption.number == signal.SIGUSR2
            with pytest.raises(Interrupted, match="SIGINT"):
                ask(signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGUSR2"):
            interruption.check()


def test_workers_leave_signals_to_the_main_process() -> None:
    """A worker that is asked to stop goes on; its data are still needed."""
    program = (
        "import os, signal; from cfssl.engine.interruption import SIGNALS, ignore_signals; "
        "ignore_signals(); [os.kill(os.getpid(), number) for number in SIGNALS]; print('here')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "here\n")
