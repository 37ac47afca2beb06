"""Ctrl-C at moments when a command has hardly begun."""

import subprocess
import sys


def test_ctrl_c_while_the_commands_are_loaded_is_no_traceback() -> None:
    code = (
        "import signal, sys\n"
        "from cots.cli import main\n"
        "class Loading:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'typer': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Loading)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
