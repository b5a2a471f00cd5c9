"""Train with TRL, LLaMA-Factory and ms-swift themselves, and hold this package to what their models say.

Each tool is installed into an environment of its own and trains tiny tied and untied Qwen2-VL, Qwen2.5-VL and Qwen3-VL,
two steps a recipe. What its model says in memory after training, before anything is saved, is the truth: `inspect`,
`rescue`, `merge` and `ask` must come to the same logits, or refuse and say why and what to do, or name what is lost.

  python tests/foreign_tools.py                                 all tools, all recipes; writes tests/FOREIGN.md
  python tests/foreign_tools.py --tool trl --recipe dora pissa  these rows again; the others of FOREIGN.md stay
  python tests/foreign_tools.py --keep                          and put small fixtures into tests/foreign/, for CI
  python tests/foreign_tools.py --envs ~/envs --work /tmp/runs  where environments and runs lie, to be used again

A tool takes about 1 GB of disk (torch for a CPU, where pip finds such a build) and five to ten minutes. Nothing is
downloaded but packages. Status: 1 when a row is wrong and not among KNOWN, or a tool did not train what it used to."""

import argparse
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from standins import stand_in
from transformers import GenerationConfig

from vlm_lora_lab.checkpoint.save import load_adapter
from vlm_lora_lab.cli import main as command
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import ask
from vlm_lora_lab.data.tokens import end_ids
from vlm_lora_lab.evaluate.ask import _read
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.published import on_meta

HERE = Path(__file__).parent
FIXTURES, TABLE, ROWS = HERE / "foreign", HERE / "FOREIGN.md", HERE / "foreign" / "rows.json"
EQUAL = 1e-5
BASES = {
    "qwen2_vl-tied": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2_vl-untied": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2_5_vl-tied": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2_5_vl-untied": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl-tied": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3_vl-untied": "Qwen/Qwen3-VL-8B-Instruct",
}
QUESTION, ANSWER = "What number is this?", "Seven."
PACKAGES = {"trl": ["trl[peft]"], "llamafactory": ["llamafactory"], "swift": ["ms-swift", "qwen_vl_utils"]}
DISTRIBUTION = {"trl": "trl", "llamafactory": "llamafactory", "swift": "ms-swift"}

LLM, EYES = r".*language_model.*\.(q_proj|v_proj)", r".*visual\.blocks.*\.(qkv|proj)"
SMALL = {"r": 4, "lora_alpha": 8, "target_modules": LLM}
ADALORA = SMALL | {"config": "AdaLoraConfig", "total_step": 2, "init_r": 4, "target_r": 2}
FACTORY = {"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target": "all"}
FULL = {"finetuning_type": "full"}
SWIFT = {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0}
WHOLE = {"tuner_type": "full", "freeze_llm": "false", "freeze_vit": "false", "freeze_aligner": "false"}
RECIPES = {  # tool -> recipe -> what the tool is told
    "trl": {
        "llm": SMALL,
        "all-linear": SMALL | {"target_modules": "all-linear"},
        "vision": SMALL | {"target_modules": EYES},
        "projector": SMALL | {"modules_to_save": ["merger"]},
        "dora": SMALL | {"use_dora": True},
        "rslora": SMALL | {"use_rslora": True},
        "dora-rslora": SMALL | {"use_dora": True, "use_rslora": True},
        "pissa": SMALL | {"init_lora_weights": "pissa"},
        "adalora": ADALORA,
        "rank-pattern": SMALL | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
        "embeddings": SMALL | {"modules_to_save": ["embed_tokens"]},
        "head": SMALL | {"modules_to_save": ["lm_head"]},
        "embeddings-head": SMALL | {"modules_to_save": ["embed_tokens", "lm_head"]},
        "embeddings-tied": SMALL | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "lora-head": SMALL | {"target_modules": ["q_proj", "lm_head"]},
        "lora-embeddings": SMALL | {"target_modules": ["q_proj", "embed_tokens"]},
        "some-tokens": SMALL | {"trainable_token_indices": [5, 6, 7]},
        "full": {"trains": [""]},
        "full-llm": {"trains": ["language_model", "lm_head"]},
        "full-projector": {"trains": ["merger"]},
        "full-vision": {"trains": ["visual.blocks", "visual.patch_embed"]},
    },
    "llamafactory": {
        "llm": FACTORY,
        "q-v": FACTORY | {"lora_target": "q_proj,v_proj"},
        "vision": FACTORY | {"freeze_vision_tower": False},
        "projector": FACTORY | {"freeze_multi_modal_projector": False},
        "vision-projector": FACTORY | {"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
        "dora": FACTORY | {"use_dora": True},
        "rslora": FACTORY | {"use_rslora": True},
        "dora-rslora": FACTORY | {"use_dora": True, "use_rslora": True},
        "pissa": FACTORY | {"pissa_init": True, "pissa_iter": -1},
        "pissa-convert": FACTORY | {"pissa_init": True, "pissa_iter": -1, "pissa_convert": True},
        "loraplus": FACTORY | {"loraplus_lr_ratio": 4.0},
        "embeddings": FACTORY | {"additional_target": "embed_tokens"},
        "head": FACTORY | {"additional_target": "lm_head"},
        "embeddings-head": FACTORY | {"additional_target": "embed_tokens,lm_head"},
        "full": FULL | {"freeze_vision_tower": False, "freeze_multi_modal_projector": False},
        "full-llm": FULL,
        "full-projector": FULL | {"freeze_language_model": True, "freeze_multi_modal_projector": False},
        "full-vision": FULL | {"freeze_language_model": True, "freeze_vision_tower": False},
        "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    },
    "swift": {
        "llm": SWIFT,
        "vision": SWIFT | {"freeze_vit": "false"},
        "projector": SWIFT | {"freeze_aligner": "false"},
        "vision-projector": SWIFT | {"freeze_vit": "false", "freeze_aligner": "false"},
        "dora": SWIFT | {"use_dora": "true"},
        "rslora": SWIFT | {"use_rslora": "true"},
        "dora-rslora": SWIFT | {"use_dora": "true", "use_rslora": "true"},
        "pissa": SWIFT | {"init_weights": "pissa"},
        "adalora": SWIFT | {"tuner_type": "adalora", "adalora_init_r": 4, "adalora_target_r": 2, "adalora_tinit": 0},
        "embeddings": SWIFT | {"modules_to_save": "embed_tokens"},
        "head": SWIFT | {"modules_to_save": "lm_head"},
        "embeddings-head": SWIFT | {"modules_to_save": ["embed_tokens", "lm_head"]},
        "lora-embeddings": SWIFT | {"target_modules": ["all-linear", "all-embedding"]},
        "lora_llm": SWIFT | {"tuner_type": "lora_llm", "freeze_vit": "false", "freeze_aligner": "false"},
        "full": WHOLE,
        "full-llm": WHOLE | {"freeze_vit": "true", "freeze_aligner": "true"},
        "full-projector": WHOLE | {"freeze_llm": "true", "freeze_vit": "true"},
        "full-vision": WHOLE | {"freeze_llm": "true", "freeze_aligner": "true"},
    },
}
# These differ by tie: they run on every base. The others take turns.
EVERYWHERE = {"embeddings", "head", "embeddings-head"}
# What is kept in tests/foreign/: of TRL all, of the others what they write in their own way.
KEPT = {
    "llamafactory": {"llm", "vision-projector", "pissa-convert", "head", "full-projector"},
    "swift": {"llm", "vision-projector", "pissa", "adalora", "lora_llm", "head", "full-projector"},
}
# What our commands still get wrong, by tool/recipe-base. A row that is mended has to leave this list.
KNOWN: dict[str, str] = {}
# What a tool itself does not train. Any other row in which a tool fails is news: of the tool, or of foreign_runner.py.
NOT_TRAINED = {
    "trl/lora-head-*": "TRL computes its loss from lm_head.weight and refuses an adapter there",
    "trl/some-tokens-*-tied": "TRL asks the head for a bias, and PEFT's wrapper around trained rows has none",
}


def sizes(values):
    "Still smaller than a stand-in: a whole model is a file of some 200 kB."
    text = values.get("text_config", values)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"hidden_size": 16, "intermediate_size": 16, **heads}
    if "head_dim" in text:
        text["head_dim"] = 8
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), dict) and "mrope_section" in text[key]:
            text[key]["mrope_section"] = [2, 1, 1]
    eyes = values["vision_config"]
    eyes |= {"depth": 3, "num_heads": 2}
    width = {"embed_dim": 16, "hidden_size": 16} if "embed_dim" in eyes else {"hidden_size": 16}
    eyes |= width | {k: 16 for k in ("out_hidden_size", "intermediate_size") if k in eyes}
    eyes |= {k: [1] for k in ("fullatt_block_indexes",) if k in eyes}
    for section in (values, text, eyes):
        section |= {k: "float32" for k in ("torch_dtype", "dtype") if k in section}
    return values


def base_of(name, folder):
    "A base that is the same everywhere and always: its weights come from NumPy's frozen random stream."
    stand_in(BASES[name], folder, small=True)
    for file in folder.glob("model*"):
        file.unlink()
    values = sizes(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    state, draw = on_meta(values).state_dict(), np.random.RandomState(0)
    tied = values.get("tie_word_embeddings") or values.get("text_config", {}).get("tie_word_embeddings")
    tensors = {}
    for n in sorted(state):
        if tied and n == "lm_head.weight":
            continue
        drawn = draw.standard_normal(tuple(state[n].shape)).astype(np.float32)
        scale = 0.3 if "embed_tokens" in n or "pos_embed" in n else state[n][0].numel() ** -0.5
        drawn = 1 + 0.1 * drawn if "norm" in n and state[n].dim() == 1 else scale * drawn
        tensors[stored_name(n, values)] = torch.from_numpy(drawn.astype(np.float32))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored_name(name, values):
    "As the published file says it: Qwen2-VL's and Qwen2.5-VL's are older than today's classes."
    if values["model_type"] == "qwen3_vl":
        return name
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def picture(name, folder):
    "A PNG whose size the family leaves as it is."
    side = 256 if name.startswith("qwen3") else 56
    pixels = np.random.RandomState(7).randint(0, 255, (side, side, 3), dtype=np.uint8)
    file = folder / f"{name}.png"
    Image.fromarray(pixels).save(file)
    return file


def prepared(base, image):
    "One question with one picture, as this package asks it."
    processor = load_processor(base)
    row = processor(ask(QUESTION, "", image, id="the only row"), answer=False)
    return {k: v for k, v in processor.collate([row], "left").items() if k != "labels"}


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits[0, -3:].float()


def spoken(ids, base):
    "The tool's own greedy answer as `ask` prints one: tokens that are commands are silent."
    processor = load_processor(base)
    ends = end_ids(processor.tokenizer, GenerationConfig.from_pretrained(base))
    return _read(ids.tolist(), processor.tokenizer, ends, processor.named).text


def say(*words):
    "Our command line: status, what it printed, and whether it came to grief."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = command([str(w) for w in words])
        except SystemExit as e:
            status = e.code
        except Exception:
            traceback.print_exc(file=err)
            status = 3
    return status, out.getvalue(), err.getvalue()


def why(err):
    "The last words of an error, in one line."
    lines = [line for line in err.strip().splitlines() if line.strip()]
    return " ".join((" ".join(lines[-3:]) if "Traceback" not in err else lines[-1]).split())


def _apart(load, inputs, wanted):
    "How far the logits are from the tool's, or what went wrong."
    return (logits_of(load(), inputs) - wanted).abs().max().item()


def hold(folder, base, image, wanted, answer, work):
    """What our commands make of a tool's folder: command -> (status, logits apart, words).

    No question is asked where there is no answer to compare with."""
    inputs, seen = prepared(base, image), {}
    status, out, err = say("inspect", folder, "--base", base, "--json")
    found = [f for f in json.loads(out)["findings"] if f["level"] != "note"] if status in (0, 1, 2) and out else []
    words = "; ".join(f"{f['level']}: {f['text']}" for f in found)
    seen["inspect"] = (status, None, why(err) if status == 3 or not out else words)
    rescued = work / "rescued"
    status, out, err = say("rescue", folder, "--base", base, "--output", rescued)
    words = [line for line in out.splitlines() if line.startswith(("LOST", "SUSPICIOUS"))]
    seen["rescue"] = (status, None, why(err) if status > 1 else " ".join(words))
    if rescued.exists():
        adapter = (rescued / "adapter_config.json").exists()
        load = (lambda: load_adapter(rescued)) if adapter else (lambda: load_vlm(rescued))
        seen["rescue"] = (status, _apart(load, inputs, wanted), seen["rescue"][2])
        if answer is not None:
            seen["ask rescued"] = _asked("--adapter" if adapter else "--model", rescued, base, image, answer)
        if adapter:
            seen["merge rescued"] = _merged(rescued, base, inputs, wanted, work / "merged-rescued")
    if (folder / "adapter_config.json").exists():
        seen["merge"] = _merged(folder, base, inputs, wanted, work / "merged")
        if answer is not None:
            seen["ask"] = _asked("--adapter", folder, base, image, answer)
    for inner in sorted(f.parent for f in folder.rglob("*convert*/**/adapter_config.json")):
        seen[f"rescue {inner.relative_to(folder)}"] = _converted(inner, base, inputs, wanted, work / "rescued-twin")
    return seen


def _converted(folder, base, inputs, wanted, output):
    "A plain LoRA that a tool wrote beside its PiSSA."
    status, out, err = say("rescue", folder, "--base", base, "--output", output)
    if not output.exists():
        return status, None, why(err) if status > 1 else out
    return status, _apart(lambda: load_adapter(output), inputs, wanted), ""


def _merged(folder, base, inputs, wanted, output):
    status, _, err = say("merge", folder, "--model", base, "--output", output)
    if status:
        return status, None, why(err)
    return status, _apart(lambda: load_vlm(output), inputs, wanted), ""


def _asked(option, folder, base, image, answer):
    more = ("--model", base) if option == "--adapter" else ()
    status, out, err = say("ask", QUESTION, "--image", image, option, folder, *more, "--max-new-tokens", 4)
    if status:
        return status, None, why(err)
    return status, 0.0 if out.strip() == answer else 1.0, f"said {out.strip()!r}, the tool {answer!r}"


def wrong(seen):
    "What our commands got wrong; empty: all were right, or said why not."
    found = []
    lost = seen["rescue"][0] == 1 and "LOST" in seen["rescue"][2]
    for name, (status, apart, words) in seen.items():
        if status == 3:
            found.append(f"{name}: traceback ({words})")
        elif status == 2 and re.search(r"in (\S+) than in \1\b", words):
            found.append(f"{name}: a file compared with itself ({words})")
        elif status == 2 and "Give the base that it was trained on" in words:
            found.append(f"{name}: the base is blamed, and it is the right one ({words})")
        elif apart is not None and not apart <= EQUAL and not (lost and "rescue" in name):
            found.append(f"{name}: {words}" if "ask" in name else f"{name}: logits {apart:.2g} off and nothing said")
    if seen["inspect"][0] == 2 and any(apart is not None and apart <= EQUAL for _, apart, _ in seen.values()):
        found.append(f"inspect: error for what can be read ({seen['inspect'][2]})")
    return found


def known(name, table=KNOWN):
    "Why a row is wrong, where that is known."
    return next((reason for pattern, reason in table.items() if fnmatchcase(name, pattern)), None)


def news(rows):
    "Rows that are wrong, or that a tool did not train, and nobody knew."
    tables = {"WRONG": KNOWN, "the tool itself": NOT_TRAINED}
    for row in rows:
        name = f"{row['tool']}/{row['recipe']}-{row['base']}"
        if any(row["verdict"].startswith(word) and not known(name, table) for word, table in tables.items()):
            yield name


def refused(seen):
    "What was refused, with its words."
    return {n: words for n, (status, apart, words) in seen.items() if apart is None and status == 2 and n != "inspect"}


def install(tool, envs):
    "The environment of a tool, made once: its Python, or what pip said."
    home = envs / tool
    python = home / "bin" / "python"
    if (home / "ready").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    for packages in (["torch", "torchvision", *cpu_torch()], PACKAGES[tool]):
        done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tool} cannot be installed; pip said:\n{done.stderr[-2000:]}")
    (home / "ready").touch()
    return python


def cpu_torch():
    "The very torch of this environment, which is a CPU build where this project's own tests run."
    return [f"torch=={torch.__version__}"] if "+cpu" in torch.__version__ else []


def bases_of(tool, recipe):
    "All, or one that is tied and one that is not."
    every, turn = list(BASES), list(RECIPES[tool]).index(recipe)
    return every if recipe in EVERYWHERE else [every[turn % 6], every[(turn + 3) % 6]]


def kept_bases(tool, recipe):
    "Whose folders become fixtures."
    if recipe not in KEPT.get(tool, RECIPES[tool]):
        return ()
    if recipe in EVERYWHERE:
        return "qwen2_5_vl-tied", "qwen2_5_vl-untied"
    if recipe in ("full", "full-llm", "full-vision", "freeze"):  # whole models: one recipe of a tool is enough
        return ()
    if recipe == "some-tokens":  # which TRL itself does not train on a tied base
        return ("qwen2_vl-untied",)
    small = [b for b in bases_of(tool, recipe) if recipe != "full-projector" or "qwen3" not in b]
    return small[:1]


def jobs_of(tool, recipes, bases, work):
    "A job for each row that was asked for."
    jobs = []
    (work / "bases").mkdir(parents=True, exist_ok=True)
    for recipe, asked in RECIPES[tool].items():
        if recipes and recipe not in recipes:
            continue
        for base in [b for b in bases_of(tool, recipe) if not bases or b in bases]:
            home = work / tool / f"{recipe}-{base}"
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            folder = work / "bases" / base
            if not folder.exists():
                base_of(base, folder)
                save_file(prepared(folder, picture(base, work / "bases")), work / "bases" / f"{base}.safetensors")
            image = work / "bases" / f"{base}.png"
            jobs.append(
                {
                    "recipe": recipe,
                    "name": base,
                    "base": str(folder),
                    "model_type": base.partition("-")[0],
                    "inputs": str(image.with_suffix(".safetensors")),
                    "output": str(home / "written"),
                    "row": {"question": QUESTION, "answer": ANSWER, "image": str(image)},
                    "asked": asked,
                }
            )
    return jobs


def train(python, tool, jobs, work):
    "All jobs of a tool, in its environment."
    (work / tool / "jobs.json").write_text(json.dumps(jobs))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_DISABLED": "true",
    }
    with open(work / tool / "log.txt", "w") as log:
        told = [python, HERE / "foreign_runner.py", tool, work / tool / "jobs.json"]
        subprocess.run(told, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=work / tool, check=False)


def written_in(home):
    "Where the tool's adapter or model lies: the folder, or its newest checkpoint."
    folder = home / "written"
    names = ("adapter_config.json", "config.json")
    if any((folder / n).exists() for n in names):
        return folder
    inner = [f.parent for n in names for f in sorted(folder.rglob(n), key=lambda f: f.stat().st_mtime)]
    return inner[-1] if inner else folder


def row_of(tool, job):
    "One row of the table."
    home = Path(job["output"]).parent
    silent = {"error": "it ended without a word; see log.txt", "versions": {}}
    said = json.loads((home / "said.json").read_text()) if (home / "said.json").exists() else silent
    row = {"tool": tool, "recipe": job["recipe"], "base": job["name"], "date": date.today().isoformat()}
    row |= {"versions": said["versions"], "version": said["versions"].get(DISTRIBUTION[tool], "?")}
    if said["error"]:
        return row | {"trained": None, "rescued": None, "apart": None, "verdict": f"the tool itself: {said['error']}"}
    told = load_file(home / "told.safetensors")
    base = Path(job["base"])
    for name in ("rescued", "merged", "merged-rescued", "rescued-twin"):
        shutil.rmtree(home / name, ignore_errors=True)
    image = Path(job["row"]["image"])
    seen = hold(written_in(home), base, image, told["logits"], spoken(told["answer"], base), home)
    held = [f for f in sorted((home / "rescued").glob("*.safetensors"))]
    row["moved"] = (logits_of(load_vlm(base), prepared(base, image)) - told["logits"]).abs().max().item()
    row["trained"] = [len(said["trained"]), sum(n for _, n in said["trained"])]
    row["rescued"] = sum(len(list(safe_open(f, "pt").keys())) for f in held) if held else None
    measured = [apart for n, (_, apart, _) in seen.items() if apart is not None and "ask" not in n]
    row["apart"] = max(measured) if measured else None
    row["seen"] = {n: [s, a, clean(w, base)] for n, (s, a, w) in seen.items()}
    row["verdict"] = clean(verdict(seen), base)
    return row


def clean(words, base):
    "Without folders of this machine."
    return re.sub(r"\S*/(?=[^/\s]+)", "", words.replace(str(base), "BASE"))


def verdict(seen):
    "In words."
    if bad := wrong(seen):
        return "WRONG: " + "; ".join(bad)
    if seen["rescue"][0] == 1:
        return "named: " + seen["rescue"][2]
    if said := refused(seen):
        roads = ", ".join(said)
        whole = "refused" if seen["rescue"][1] is None else f"equal; refused by {roads}"
        return f"{whole}: {next(iter(said.values()))}"
    return "equal"


def keep(tool, job, row):
    "A fixture: what the tool wrote, as far as it tells something, and what its model said."
    home, target = Path(job["output"]).parent, FIXTURES / tool / f"{job['recipe']}-{job['name']}"
    if job["name"] not in kept_bases(tool, job["recipe"]):
        return
    source = written_in(home)
    wanted = [f for f in sorted(source.rglob("*")) if f.is_file() and told_by(f.relative_to(source))]
    if sum(f.stat().st_size for f in wanted) > 300_000:
        print(f"too large for a fixture: {target.name}")
        return
    shutil.rmtree(target, ignore_errors=True)
    for file in wanted:
        to = target / "written" / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            text = file.read_text().replace(str(Path(job["base"]).parent), "bases").replace(str(home), "run")
            to.write_text(text)
        else:
            shutil.copyfile(file, to)
    told = load_file(home / "told.safetensors")
    about = {"tool": tool, "recipe": job["recipe"], "base": job["name"], "versions": json.dumps(row["versions"])}
    about["weights"] = weights_of(Path(job["base"]))
    save_file(told, target / "told.safetensors", metadata=about)


def told_by(name):
    "Weights and their settings; tokenizers, pictures of the loss and pickles with paths in them stay out."
    kept = ("adapter_config.json", "config.json", "args.json", "additional_config.json")
    inner = all(part not in ("runs", "images") and not part.startswith("checkpoint-") for part in name.parts[:-1])
    return inner and (name.name in kept or name.suffix == ".safetensors" or name.name.endswith(".index.json"))


def weights_of(base):
    "A few numbers of a base: a fixture belongs to these."
    tensors = load_file(base / "model.safetensors")
    return " ".join(f"{n}={tensors[n].double().sum():.6f}" for n in sorted(tensors)[:: max(1, len(tensors) // 4)])


def write_table(rows):
    "tests/foreign/rows.json and FOREIGN.md; runs that go on side by side take turns."
    ROWS.parent.mkdir(exist_ok=True)
    with open(TABLE, "a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        old = json.loads(ROWS.read_text()) if ROWS.exists() else []
        new = {(r["tool"], r["recipe"], r["base"]): r for r in [*old, *rows]}
        order = {name: i for i, name in enumerate((t, r) for t in RECIPES for r in RECIPES[t])}
        kept = sorted((k for k in new if k[:2] in order), key=lambda k: (order[k[:2]], k[2]))
        ROWS.write_text("[\n" + ",\n".join(json.dumps(new[k]) for k in kept) + "\n]\n")
        TABLE.write_text("\n".join(page([new[k] for k in kept])) + "\n")


def page(rows):
    "The lines of FOREIGN.md."
    yield "# What other tools wrote, and what our commands made of it\n"
    yield (
        "Made by `python tests/foreign_tools.py`: each tool trained a tiny model itself, two steps in 32 bit, and said "
        "what it made of one question with one picture before it saved. *Moved* is how far training took a logit from "
        "the base; *apart* is the largest difference of a logit from the tool's over `rescue`, `merge` of what was "
        "rescued, and `merge` of the tool's own folder, as far as they ran; `ask` must give the tool's own greedy "
        "answer. *equal* means 1e-5 everywhere, and nothing said that is not so; behind *refused by* stands what "
        "to use instead.\n"
    )
    for tool in RECIPES:
        mine = [r for r in rows if r["tool"] == tool]
        if not mine:
            continue
        seen = sorted({json.dumps(r["versions"]) for r in mine})
        yield f"\n## {tool}\n"
        yield "With " + "; or ".join(", ".join(f"{k} {v}" for k, v in json.loads(s).items()) for s in seen) + ".\n"
        counts = [sum(r["verdict"].startswith(w) for r in mine) for w in ("equal", "refused", "named", "WRONG", "the")]
        words = ("equal", "refused with a reason", "named as lost or suspicious", "wrong", "not trained by the tool")
        yield f"{len(mine)} rows: " + ", ".join(f"{n} {w}" for n, w in zip(counts, words) if n) + ".\n"
        yield "| version | recipe | base | trained: tensors, weights | moved | rescued | apart | verdict | date |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for r in mine:
            trained = "–" if r["trained"] is None else f"{r['trained'][0]}, {r['trained'][1]:,}"
            apart = "–" if r["apart"] is None else f"{r['apart']:.1e}"
            told = r["verdict"].replace("|", "\\|")
            rescued = "–" if r["rescued"] is None else r["rescued"]
            moved = f"{r['moved']:.2f}" if r.get("moved") is not None else "–"
            cells = r["version"], r["recipe"], r["base"], trained, moved, rescued, apart, told, r["date"]
            yield "| " + " | ".join(map(str, cells)) + " |"


def options(words=None):
    "Of the command line."
    about, _, more = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tool", nargs="+", choices=[*RECIPES], default=[*RECIPES], help="default: all")
    names = sorted({r for t in RECIPES.values() for r in t})
    p.add_argument("--recipe", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    p.add_argument("--base", nargs="+", choices=[*BASES], help="some of the six (default: those of the recipe)")
    p.add_argument("--keep", action="store_true", help="write fixtures into tests/foreign/")
    p.add_argument("--judge", action="store_true", help="train nothing: judge again what lies in --work")
    p.add_argument("--envs", type=Path, help="folder of environments (default: a temporary one)")
    p.add_argument("--work", type=Path, help="folder of runs (default: a temporary one)")
    return p.parse_args(words)


def main():
    given = options()
    with tempfile.TemporaryDirectory() as temporary:
        envs, work = (
            (given.envs or Path(temporary) / "envs").absolute(),
            (given.work or Path(temporary) / "work").absolute(),
        )
        rows = []
        for tool in given.tool:
            if given.judge:
                jobs = json.loads((work / tool / "jobs.json").read_text())
            else:
                jobs = jobs_of(tool, given.recipe, given.base, work)
                if not jobs:
                    continue
                train(install(tool, envs), tool, jobs, work)
            for job in jobs:
                if job["recipe"] not in (given.recipe or (job["recipe"],)):
                    continue
                if job["name"] not in (given.base or (job["name"],)):
                    continue
                row = row_of(tool, job)
                print(tool, row["recipe"], row["base"], row["apart"], row["verdict"][:300], flush=True)
                rows.append(row)
                if given.keep and row["trained"]:
                    keep(tool, job, row)
                write_table(rows[-1:])
    for name in (found := list(news(rows))):
        print(f"Wrong, or not trained, and not known so far: {name}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
