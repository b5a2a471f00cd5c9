"""Every widget of the book: from a fresh kernel, under a reader's hand, and on a page where no kernel answers."""

import base64
import io
import json
import re
import symtable
from pathlib import Path

import pytest
from PIL import Image
from traitlets import TraitError

from vlm_lora_lab.models.parts import PARTS
from vlm_lora_lab.models.published import PUBLISHED, on_meta
from vlm_lora_lab.lora.variants import VARIANTS
from vlm_lora_lab.plan.explorer import PlanExplorer
from vlm_lora_lab.plan.preview import Preview
from vlm_lora_lab.plan.tuning import WORDS, TuningPlan
from vlm_lora_lab.show import Dial
from vlm_lora_lab.train.watch import training_curve

NBS = Path(__file__).parent.parent / "nbs"
VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
# chapter -> name of its widget, and the form that a page without a kernel shows
WIDGETS = {
    "reference/show": ("dial", "image/png"),
    "reference/plan.explorer": ("explorer", "text/html"),
    "15_quant.nf4": ("pull", "image/png"),
    "10_lora.linear": ("room", "image/png"),
}
LIVE = "reference/train.watch"  # redrawn by a run, not by a hand: an output that is updated, no widget
MODEL = "openbmb/MiniCPM-V-2_6"


def code_of(chapter):
    "(source, outputs) of the cells that a reader runs; of what the chapter exports the imports only."
    cells = json.loads((NBS / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = [("".join(c["source"]), c["outputs"]) for c in cells if c["cell_type"] == "code"]
    skipped = re.compile(r"^#\| *(eval: false|default_exp)|^#\| *export\b(?s:.*)^(def|class|@|[A-Z_]+ = )", re.M)
    return [(s, o) for s, o in found if not skipped.search(s)]


def made_and_read(source):
    "Names that a cell gives a value, and global names that it reads, in functions too."
    top = symtable.symtable(source, "cell", "exec")
    made = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    read, tables = {s.get_name() for s in top.get_symbols() if s.is_referenced()}, list(top.get_children())
    while tables:
        table = tables.pop()
        read |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        tables += table.get_children()
    return made, read


def widget_cell(chapter):
    "Number of the cell that shows the widget, among those of `code_of`."
    [n] = [n for n, (s, _) in enumerate(code_of(chapter)) if s.splitlines()[-1] == WIDGETS[chapter][0]]
    return n


def path_to(chapter):
    "The cells that the widget's cell needs, and that cell, in order."
    cells, last = [s for s, _ in code_of(chapter)], widget_cell(chapter)
    kept, wanted = [], set()
    for n in range(last, -1, -1):
        made, read = made_and_read(cells[n])
        if n == last or made & wanted:
            kept.insert(0, cells[n])
            wanted = (wanted | read) - made
    return kept


MOVES = """
import hashlib, json, traitlets
seen = []
def note(**setting):
    figure = hashlib.sha256({0}.fields["figure"].value).hexdigest()
    seen.append([{{k: {0}.fields[k].value for k in {0}.choices}}, {0}.fields["words"].value, figure])
note()
for name, values in {0}.choices.items():
    start = {0}.fields[name].value
    for value in values:
        {0}.fields[name].value = value
        note()
    for trait, bad in (("value", 3.14), ("index", len(values)), ("index", -1), ("label", "all")):
        try:
            setattr({0}.fields[name], trait, bad)
        except traitlets.TraitError:
            note()
    {0}.fields[name].value = start
print(json.dumps(seen))
"""
DRAWN_AGAIN = """
from transformers import TrainerControl, TrainerState
from vlm_lora_lab.train.watch import LivePlot
plot, state = LivePlot(seconds=0), TrainerState(is_world_process_zero=True)
plot.on_log(None, state, None, logs={})
for step in (1, 2, 3):
    state.log_history.append({"step": step, "loss": 1 / step})
    plot.on_log(None, state, None, logs=state.log_history[-1])
plot.on_train_end(None, state, None)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    "A fresh kernel that ran each widget's cells, with nothing left of the others: (chapter -> its cells, states)."
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = {}
    for chapter, (name, _) in WIDGETS.items():
        moves = [MOVES.format(name)] if name != "explorer" else []
        package = f"from vlm_lora_lab.{re.sub(r'^(reference/|[0-9]+_)', '', chapter)} import *"
        sources = ("%reset -f", package, *path_to(chapter), *moves)
        cells[chapter] = [nbformat.v4.new_code_cell(s) for s in sources]
    cells[LIVE] = [nbformat.v4.new_code_cell(s) for s in ("%reset -f", DRAWN_AGAIN)]
    book = nbformat.v4.new_notebook(cells=[c for part in cells.values() for c in part])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)  # set by the command line in this process; a kernel has its own
        at = {"metadata": {"path": str(tmp_path_factory.mktemp("kernel"))}}
        nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources=at).execute()
    return cells, book.metadata.widgets[STATE]["state"]


def shown_by(chapter, kernel):
    "What the widget's cell put out."
    cell = kernel[0][chapter][1 + len(path_to(chapter))]
    [output] = [o for o in cell.outputs if o.output_type == "execute_result"]
    return output.data


def inside(state, model):
    "A widget and all that lie in it."
    yield state[model]
    for child in state[model]["state"].get("children", ()):
        yield from inside(state, child.removeprefix("IPY_MODEL_"))


def test_these_are_all_widgets():
    makers = re.compile(r"\b(Dial|PlanExplorer|LivePlot)\(")
    chapters = {p.relative_to(NBS).with_suffix("").as_posix() for p in NBS.rglob("*.ipynb")}
    assert {c for c in chapters if any(makers.search(s) for s, _ in code_of(c))} == {*WIDGETS, LIVE}
    package = NBS.parent / "vlm_lora_lab"
    users = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if "import ipywidgets" in p.read_text()}
    assert users == {"show.py", "plan/explorer.py"}, "a new widget needs its moves here"


@pytest.mark.parametrize("chapter", WIDGETS)
def test_from_a_fresh_kernel_there_is_a_widget_and_a_form_without_one(chapter, kernel):
    data, form = shown_by(chapter, kernel), WIDGETS[chapter][1]
    assert set(data) == {"text/plain", form, VIEW}
    parts = list(inside(kernel[1], data[VIEW]["model_id"]))
    names = [p["model_name"] for p in parts]
    assert all(p["model_module"].startswith("@jupyter-widgets/") for p in parts), "Colab has these and no others"
    if form == "text/html":
        kinds = {"DropdownModel": 2, "ToggleButtonsModel": 5, "TextModel": 6, "IntTextModel": 1, "FloatTextModel": 3}
        assert {k: names.count(k) for k in kinds} == kinds
        [view] = [p["state"]["value"] for p in parts if p["model_name"] == "HTMLModel"]
        assert view == "".join(data[form]), "the table of the page is the one below the buttons"
    else:
        sliders = [p["state"] for p in parts if p["model_name"] == "SelectionSliderModel"]
        assert sliders and {"ImageModel", "HTMLModel"} < set(names)
        assert all(s["_options_labels"] and not s["continuous_update"] for s in sliders)


@pytest.mark.parametrize("chapter", WIDGETS)
def test_without_a_kernel_the_page_has_a_picture_or_a_table(chapter):
    source, [output] = code_of(chapter)[widget_cell(chapter)]
    form = WIDGETS[chapter][1]
    assert set(output["data"]) == {"text/plain", form}, "run the chapter with exec_nb: a widget is not kept"
    if form == "image/png":
        picture = Image.open(io.BytesIO(base64.b64decode("".join(output["data"][form]))))
        assert picture.width > 300 and len(picture.convert("RGB").getcolors(10**6)) > 20, "blank"
        assert re.search(r"^#\| fig-alt: .{80}", source, re.M)


@pytest.mark.parametrize("chapter", WIDGETS)
def test_what_a_widget_reads_is_not_changed_further_down(chapter):
    "A reader runs the whole chapter, scrolls back and moves a slider."
    cells, at = [s for s, _ in code_of(chapter)], widget_cell(chapter)
    read = made_and_read(cells[at])[1]
    for source in reversed(path_to(chapter)[:-1]):
        made, below = made_and_read(source)
        read |= below if made & read and "def " in source else set()
    later = {name for s in cells[at + 1 :] for name in made_and_read(s)[0] if f"import {name}" not in s}
    assert not (read - made_and_read(cells[at])[0]) & later


def seen_of(chapter, kernel):
    "(setting, words, figure) before and after each move."
    [said] = [o.text for o in kernel[0][chapter][-1].outputs]
    moves = json.loads(said)
    assert len({json.dumps(s) for s, *_ in moves}) == len({f for *_, f in moves}), "one figure for each setting"
    assert all(words.startswith(", ".join(f"{k} {v}" for k, v in s.items()) + ": ") for s, words, _ in moves)
    return moves


def test_powers_move(kernel):
    moves = seen_of("reference/show", kernel)
    assert [s["power"] for s, *_ in moves] == [1, 1, 2, 3, 4] + 4 * [4]  # four bad values change nothing
    assert [words for _, words, _ in moves][2:5] == [f"power {p}: 2 becomes {2**p}" for p in (2, 3, 4)]


def test_an_outlier_takes_the_levels_of_its_block(kernel):
    moves = seen_of("15_quant.nf4", kernel)
    found = {}
    for setting, words, _ in moves:
        others, levels, off = re.search(r"for the (\d+) others: (\d+); their error ([\d.]+)%$", words).groups()
        assert int(others) == setting["block"] - 1
        found[setting["outlier"], setting["block"]] = int(levels), float(off)
    at_64 = [found[times, 64] for times in (1, 2, 3, 5, 10, 20, 50)]
    assert {b for _, b in found} == {16, 64, 256, 1024} and at_64[0][0] > 11 and at_64[-2][0] == 1
    assert at_64 == sorted(at_64, key=lambda at: -at[0]) and at_64[0][1] < 12 < 99 < at_64[-1][1]
    assert len(moves) == 1 + 7 + 4 + 2 * 4


def test_a_rank_with_room_for_the_goal_has_no_floor(kernel):
    moves = seen_of("10_lora.linear", kernel)
    ranks = set()
    for setting, words, _ in moves:
        bound, trained = map(float, re.search(r"bound ([\d.]+), trained to ([\d.]+)$", words).groups())
        assert bound <= trained < 1.1 * bound + 1e-3, words
        assert (bound == 0) == (setting["rank"] >= setting["directions"]), words
        ranks.add((setting["directions"], setting["rank"]))
    assert ranks == {(d, 4) for d in (1, 2, 4, 8, 16, 32)} | {(16, r) for r in (1, 2, 4, 8, 16, 32)}
    assert len(moves) == 1 + 2 * (6 + 4)


def test_sliders_begin_at_the_first_still_or_nowhere():
    def draw(ax, a, b):
        return f"{a}<{b}"

    dial = Dial("?", draw, {"a": 2, "b": "x"}, {"a": 1, "b": "y"}, a=(1, 2), b=("x", "y"))
    assert dial.widget is dial.widget and dial.fields["words"].value == "a 2, b x: 2&lt;x"
    assert repr(dial) == "a 2, b x: 2<x\na 1, b y: 1<y"
    with pytest.raises(TraitError, match="Invalid selection"):
        Dial("?", draw, {"a": 3, "b": "x"}, a=(1, 2), b=("x",)).widget


def test_fields_begin_where_the_plan_is_and_move_it():
    explorer = PlanExplorer(
        MODEL, language="lora on 0-15", rank=8, targets=("q_proj",), dropout=0.1, variant="dora", lora_plus=16
    )
    box, f = explorer.widget, explorer.fields
    begun = [f[k].value for k in ("language rules", "targets", "rank", "dropout", "variant", "lora_plus")]
    assert box is explorer.widget and begun == ["lora on 0-15", "q_proj", 8, 0.1, "dora", 16] and f["language"].disabled
    f["rank"].value = 9
    assert explorer.plan == TuningPlan.of({**explorer.look.options, "rank": 9, "lora_plus": 16}), "nothing is lost"
    f["rank"].value, f["variant"].value, f["lora_plus"].value = 8, "lora", 1
    f["targets"].value, f["language rules"].value = " q_proj,v_proj  ", ""
    f["language"].value = "lora"
    f["alpha"].value, f["dropout"].value = 12.5, 0.0
    assert not f["language"].disabled
    plan = TuningPlan(rank=8, alpha=12.5, targets=("q_proj", "v_proj"))
    assert explorer.plan == plan and explorer.look.preview == Preview.of(on_meta(MODEL), plan)
    for name, value, says in (
        ("rank", -3, "rank is -3"),
        ("rank", 10**12, "rank is 1000000000000"),
        ("alpha", 0.0, "alpha is 0"),
        ("alpha", float("nan"), "alpha is nan"),
        ("dropout", 1.0, "dropout is 1"),
        ("lora_plus", 0.0, "lora_plus is 0"),
        ("lora_plus", float("inf"), "lora_plus is inf"),
        ("vision rules", "lora(rnk=2)", "says something that is not known"),
        ("connector rules", "lora(", "connector"),
        ("language rules", "lora on 99", "99"),
        ("head rules", "<b>", "head"),
        ("targets", "kproj", "kproj is no linear layer"),
        ("targets", "(", "targets"),
        ("embeddings rules", "lora on 3", "embeddings"),
    ):
        before, f[name].value = f[name].value, value
        assert explorer.plan is None and says in explorer.look.error, (name, value, explorer.look.error)
        assert f["view"].value == explorer.look._repr_html_() and "<b>This cannot be.</b>" in f["view"].value
        f[name].value = before
        assert explorer.plan == plan
    f["model"].value = "Qwen/Qwen-VL"
    assert "Choose among c_attn" in f["view"].value


def test_every_button_word_variant_and_model_of_the_explorer():
    explorer = PlanExplorer("lab")
    f, moved = explorer.widget and explorer.fields, set()

    def move(name, value):
        f[name].value = value
        moved.add(name)
        look = explorer.look
        assert bool(look.preview) != bool(look.error) and f["view"].value == look._repr_html_()
        return look

    for part in PARTS:
        start = f[part].value
        for word in WORDS:
            look = move(part, word)
            assert look.error or getattr(look.preview.plan, part) == word
            assert look.error or dict(zip(PARTS, look.under))[part][word] > 0 or part == "head"
        move(part, start)
        move(f"{part} rules", "full on 0" if part == "language" else "freeze")
        assert f[part].disabled
        move(f"{part} rules", "")
        assert not f[part].disabled
    for variant in VARIANTS:
        move("variant", variant)
        assert explorer.look.error or explorer.plan.variant == variant
    move("variant", "lora")
    sizes = [move("rank", rank).preview.adapter_bytes for rank in (1, 4, 64)]
    assert sizes == sorted(set(sizes)) and move("alpha", 8.0).preview and move("dropout", 0.5).preview
    assert explorer.plan.alpha == 8 and explorer.plan.dropout == 0.5
    assert move("lora_plus", 16.0).preview and "--lora-plus 16" in f["view"].value
    assert move("targets", "q_proj,, v_proj").preview.plan.targets == ("q_proj", "v_proj")
    move("targets", "")
    for name in ("lab", *list({p.config["model_type"]: n for n, p in PUBLISHED.items()}.values())[:6]):
        assert move("model", name).model == name
    with pytest.raises(TraitError):
        f["model"].value = "nobody/nothing"
    assert moved == set(f) - {"view"}, "a control that nobody moved"


def test_without_a_kernel_there_is_a_table_and_no_widget():
    assert set(PlanExplorer("lab")._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_in_a_real_kernel_one_curve_is_drawn_again_and_again(kernel):
    pictures = [o for o in kernel[0][LIVE][-1].outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1  # updated in place, not three below each other
    assert "0.33 at the end" in training_curve([{"step": s, "loss": 1 / s} for s in (1, 2, 3)]).axes[0].get_title()
