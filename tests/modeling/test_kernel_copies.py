"""What convolutions take while they run, as the kernel counts it in a process of their own."""

import json
import subprocess
import sys

import pytest

MIB = 1 << 20
CODE = """
import json, re, sys
import torch
from layerstream.pipeline.modeling.kernel_copies import kernel_code_bytes, kernel_copies
from layerstream.stages.process.libraries import limit_library_memory

def memory():
    text = open("/proc/self/status").read()
    return {name: int(re.search(name + r":\\s+(\\d+)", text)[1]) << 10 for name in ("VmHWM", "VmRSS", "RssFile")}

dtype, inputs, weight, stride, transposed = json.loads(sys.argv[1])
limit_library_memory()
inputs, weight = torch.randn(inputs).to(getattr(torch, dtype)), torch.randn(weight).to(getattr(torch, dtype))
arguments = (None, [stride], [0], [1], transposed, [0], 1)
convolve = torch.ops.aten.convolution.default
# Loads the library.
convolve(torch.ones(1, 16, 64, dtype=inputs.dtype), torch.ones(16, 16, 3, dtype=inputs.dtype), None, [1], [0], [1], False, [0], 1)
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
before = memory()
result = convolve(inputs, weight, *arguments)
after = memory()
given = (inputs, weight, *arguments)
print(json.dumps({
    "took": after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"]),
    "result": result.nbytes,
    "copies": sum(kernel_copies(convolve, given, result)),
    "code": kernel_code_bytes(convolve, given, result),
}))
"""


@pytest.mark.parametrize(
    ("dtype", "inputs", "weight", "stride", "transposed"),
    [
        ("bfloat16", (1, 1, 224_000), (64, 1, 127), 64, False),
        ("bfloat16", (4, 80, 3000), (384, 80, 3), 1, False),
        ("bfloat16", (1, 64, 64_000), (64, 32, 4), 2, True),
        ("float32", (2, 256, 4000), (256, 128, 16), 8, True),
        ("float32", (2, 32, 128_000), (1, 32, 7), 1, False),
    ],
)
def test_a_convolution_takes_no_more_than_is_counted(
    dtype: str,
    inputs: tuple[int, ...],
    weight: tuple[int, ...],
    stride: int,
    transposed: bool,
) -> None:
    given = json.dumps([dtype, inputs, weight, stride, transposed])
    ran = subprocess.run(
        [sys.executable, "-c", CODE, given], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    counted = found["result"] + found["copies"] + found["code"]
    assert found["took"] <= counted + 2 * MIB, found
