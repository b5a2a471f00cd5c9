"""Run the tutorials as Colab would: from another folder, with the installed package, and a tiny random model in place
of each name of the hub.

    python tests/run_tutorials.py                  all that can be run
    python tests/run_tutorials.py qwen_vl          some of them
    python tests/run_tutorials.py --installed      refuse the package of this checkout: it must come from a wheel

nbclient, ipykernel and pytest are needed beside the package."""

import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
# The model of each tutorial, which has a stand-in of tests/standins.py; None: it takes the lab model.
TUTORIALS = {
    "minicpmv_2_6": "openbmb/MiniCPM-V-2_6",
    "minicpmv_4_5": "openbmb/MiniCPM-V-4_5",
    "minicpmv_4_6": "openbmb/MiniCPM-V-4.6",
    "qwen_vl": "Qwen/Qwen-VL-Chat",
    "qwen3_vl_2b": "Qwen/Qwen3-VL-2B-Instruct",
    "your_own_data": "openbmb/MiniCPM-V-2_6",
    "rescue_a_run": None,
}


def run(stem, work):
    "Every cell that is not for Colab alone, in order, in a fresh kernel."
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(HERE.parent / "nbs" / "tutorials" / f"{stem}.ipynb", 4)
    notebook.cells = [c for c in notebook.cells if not c.source.startswith("#| eval: false")]
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()
    return notebook


def walk(stem, place):
    "One tutorial, in a folder of its own; it must have said that it runs on a stand-in."
    start = time.perf_counter()
    place.mkdir(parents=True)
    said = json.dumps([c.get("outputs", []) for c in run(stem, place).cells])
    assert not TUTORIALS[stem] or "VLM_LORA_LAB_STAND_IN is set" in said, (
        f"{stem} did not say that it runs on a stand-in"
    )
    print(f"{stem}: every cell ran, {time.perf_counter() - start:.0f} s", flush=True)


def main(arguments):
    chosen = [a for a in arguments if a != "--installed"]
    if unknown := sorted(set(chosen) - set(TUTORIALS)):
        sys.exit(f"there is no tutorial {unknown[0]!r}; there are {', '.join(TUTORIALS)}")
    sys.path[0] = str(HERE)  # tests/ alone: the package must come from the environment
    import vlm_lora_lab
    from standins import stand_in

    root = Path(vlm_lora_lab.__file__).resolve().parent.parent
    if "--installed" in arguments and root == HERE.parent:
        sys.exit("the package comes from this checkout, not from a wheel: unset PYTHONPATH, and install the wheel")
    print(f"vlm_lora_lab {vlm_lora_lab.__version__}, {'from this checkout' if root == HERE.parent else 'installed'}")
    stems = [s for s in TUTORIALS if not chosen or s in chosen]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(2) as two:
        work = Path(work)
        hub = {
            name: stand_in(name, work / name.replace("/", "--"), small=True)
            for name in sorted({TUTORIALS[s] for s in stems if TUTORIALS[s]})
        }
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        os.environ["VLM_LORA_LAB_STAND_IN"] = os.pathsep.join(f"{name}={folder}" for name, folder in hub.items())
        list(two.map(lambda stem: walk(stem, work / "runs" / stem), stems))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
