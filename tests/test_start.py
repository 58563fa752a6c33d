"""What a start must not wait for."""

import subprocess
import sys

RUN = """
import sys
import swiftwan as sw
request = sw.TextToVideo("a red circle moves left", width=32, height=32, num_frames=1, num_inference_steps=1, seed=1)
sw.Engine.load("pocket", request=request, device="cpu").run(request)
slow = ("torch._dynamo", "torch._inductor", "sympy", "scipy", "sklearn", "pandas", "diffusers", "torchao", "peft",
        "transformers")
print(*(name for name in slow if name in sys.modules))
"""


def test_a_run_imports_neither_a_compiler_nor_diffusers_nor_transformers():
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
