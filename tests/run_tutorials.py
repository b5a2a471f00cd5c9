"""Run the tutorials as Colab would: from another folder, with the installed package, and a small random model in place
of each name of the hub. What a cell prints is held against the output that its notebook keeps: to the letter, or less
its numbers where the cell says `#| varies` (a loss, a time, a size of the stand-in).

    python tests/run_tutorials.py                  all that can be run
    python tests/run_tutorials.py qwen_vl          some of them
    python tests/run_tutorials.py --installed      refuse the package of this checkout: it must come from a wheel
    python tests/run_tutorials.py --write          keep what was printed in the notebooks, with today's date

nbclient, ipykernel and pytest are needed beside the package."""

import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
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
    "your_own_data": None,
    "rescue_a_run": None,
}


def notebook_of(stem):
    return HERE.parent / "nbs" / "tutorials" / f"{stem}.ipynb"


def run(stem, place):
    "Every cell that is not for Colab alone, in order, in a fresh kernel."
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(notebook_of(stem), 4)
    notebook.cells = [c for c in notebook.cells if not c.source.startswith("#| eval: false")]
    # a busy machine sends what was printed long after the cell is done
    patience = {"timeout": 900, "iopub_timeout": 300}
    NotebookClient(notebook, **patience, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    return notebook


def kept(outputs, names):
    "Outputs less what is of one machine or moment: the error stream, bars of progress, counts of cells, paths."
    bar = "application/vnd.jupyter.widget-view+json"
    here = [o for o in outputs if o.get("name") != "stderr" and bar not in o.get("data", {})]
    text = json.dumps([{k: None if k == "execution_count" else v for k, v in o.items()} for o in here])
    for path, name in names.items():
        text = text.replace(path, name)
    return json.loads(text)


def printed(
    outputs,  # of a cell, as a notebook or a kernel gives them
    varies=False,  # less the numbers, and an interval that is not there where two models answer alike
):  # words
    "What a reader reads: the printed lines and the plain form of objects."
    lines = "\n".join("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in outputs)
    if varies:
        lines = re.sub(r"[-+±]?\d[\d.,:e+-]*", "#", re.sub(r"\+(cpu|cu\d+)", "", lines))
        lines = re.sub(r"\(#%? to #%?\)", "", lines)
    return lines.split()


def walk(stem, place, names, write):
    "One tutorial, in a folder of its own; it must have said that it runs on a stand-in."
    start = time.perf_counter()
    place.mkdir(parents=True)
    cells = {c.id: c for c in run(stem, place).cells if c.cell_type == "code"}
    said = json.dumps([c.outputs for c in cells.values()])
    assert not TUTORIALS[stem] or "VLM_LORA_LAB_STAND_IN is set" in said, (
        f"{stem} did not say that it runs on a stand-in"
    )
    notebook = json.loads(notebook_of(stem).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["id"] in cells:
            now = kept(cells[cell["id"]].outputs, {f"{place}/": "", str(place): "."} | names)
            varies = "#| varies" in "".join(cell["source"])
            if write:
                cell["outputs"] = now
            elif printed(now, varies) != printed(cell["outputs"], varies):
                sys.exit(
                    f"{stem}, cell {cell['id']} prints another text than its notebook shows:\n"
                    f"{' '.join(printed(now, varies))}\n--- and in the notebook\n"
                    f"{' '.join(printed(cell['outputs'], varies))}\n"
                    f"If that is right: python tests/run_tutorials.py --write {stem}"
                )
    if write:
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)  # as nbdev_clean does
        text = re.sub(r"(printed on )\d{4}-\d\d-\d\d", rf"\g<1>{date.today()}", text)
        notebook_of(stem).write_text(text + "\n", encoding="utf-8")
    print(f"{stem}: every cell ran, {time.perf_counter() - start:.0f} s", flush=True)


def main(arguments):
    chosen, write = [a for a in arguments if a not in ("--installed", "--write")], "--write" in arguments
    if unknown := sorted(set(chosen) - set(TUTORIALS)):
        sys.exit(f"there is no tutorial {unknown[0]!r}; there are {', '.join(TUTORIALS)}")
    sys.path[0] = str(HERE)  # tests/ alone: the package must come from the environment
    import vlm_lora_lab
    from standins import stand_in
    from vlm_lora_lab.data.records import samples_folder

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
        names = {str(folder): name for name, folder in hub.items()} | {str(samples_folder()): "data_samples"}
        list(two.map(lambda stem: walk(stem, work / "runs" / stem, names, write), stems))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
