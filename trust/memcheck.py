"""The fuzzer under valgrind, which sees what is read before it is written. It has no AVX-512, and tells so by CPUID."""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

OURS = "pyx_xent"
CODE = "import json, sys; from trust import fuzz; fuzz.run(int(sys.argv[1]), tuple(json.loads(sys.argv[2])))"


def reports(calls, seed):
    """Errors with a function of ours on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = ["valgrind", "--xml=yes", f"--xml-file={file.name}", "--leak-check=no", "--error-limit=no"]
        result = subprocess.run(
            [*command, sys.executable, "-c", CODE, str(calls), json.dumps(seed)],
            env={**os.environ, "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode:
            raise SystemExit(f"the fuzzer under valgrind ended with {result.returncode}:\n{result.stderr[-2000:]}")
        return [text for error in ElementTree.parse(file.name).iter("error") if (text := described(error))]


def described(error):
    """None for those of others, and for what is not given back."""
    frames = [(frame.findtext("obj") or "", frame.findtext("fn") or "?") for frame in error.find("stack")]
    if error.findtext("kind").startswith("Leak") or not any(f"/{OURS}/" in file for file, _ in frames):
        return None
    return f"{error.findtext('kind')}: {' < '.join(function for _, function in frames[:4])}"


def job(arguments):
    return reports(*arguments)
