"""Why one wheel fits every Python and torch: what the library of the operators needs of them."""

import re
import shutil
import subprocess

import pytest

from fdcr_fast import _native

pytestmark = [
    pytest.mark.skipif(not _native.LIBRARY.exists(), reason="the extension was not built"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="no nm"),
]


def test_it_needs_no_python_and_only_the_stable_abi_of_torch():
    command = ["nm", "--dynamic", "--demangle", "--undefined-only", _native.LIBRARY]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [re.split(r"\s[Uwv]\s", line, maxsplit=1)[1] for line in lines]
    assert [name for name in names if re.match(r"_?Py", name)] == []
    assert [name for name in names if re.search(r"\b(c10|at|torch|caffe2)::", name)] == []
    assert sum(name.startswith(("torch_", "aoti_torch_")) for name in names) > 20
