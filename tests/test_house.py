"""The house: who may import whom, what stays out of the door, and that the picture in the design is the code."""

import ast
import re
import sys

import pytest
from conftest import ROOT, python

# A file imports only from places further down this list, so there is no circle anywhere.
ORDER = [
    *("dilatedUnet", "train.run", "train.finish", "train.recorder", "train.trainee", "train.feed"),
    *("train.initial", "train.record"),
    *("predict.export", "predict.twins", "predict.prediction", "predict.blocks", "predict.engines"),
    *("predict.borders", "predict.rescale", "predict.intensity", "predict.tiling"),
    *("studies.reproduce", "studies.records", "studies.rows", "studies.comparison", "studies.verdicts"),
    *("score.evaluation", "score.report", "score.scores", "score.segments"),
    *("data", "figures", "augment", "clr_callback"),
    *("network.unet", "network.field", "network.layers", "network.onednn", "network.losses", "network.optimizers"),
    *("network.startup", "network.device", "network.distribution", "network.hashing", "network.outline"),
    *("files.fetching", "files.labels", "files.omezarr", "files.rois", "files.writing", "files.stacks"),
    *("files.hdf5", "files.mrc", "files.tiff"),
    *("files.sections", "files.synthetic", "files.ahead", "files.atomic", "files.shell", "files.flags"),
]
ROOMS = ("train", "predict", "score", "studies", "network", "files")
DOOR = ("augment", "clr_callback", "data", "dilatedUnet", "figures", "start")
FILES = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in ROOT.glob(f"{room}/*.py") if file.stem != "__init__")]
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts): ast.parse(f.read_text()) for f in sorted(FILES)}
WITHOUT_KERAS = [name for name in ORDER if name.startswith(("score.", "studies.", "files."))]
WITHOUT_KERAS += ["predict.prediction", "predict.export"]
LIGHT, KERAS = ["data", "score.scores", "score.evaluation", "figures"], {"keras", "tensorflow", "jax", "torch"}
HEAVY = KERAS | {"scipy", "skimage", "sklearn", "numba", "tifffile", "matplotlib", "pooch", "PIL", "requests"}


def imports(tree, *, only_top_level=False):
    """First names of the modules that a file imports, and its own as `room.file`."""
    for node in tree.body if only_top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name if name in ORDER else name.split(".")[0] for name in (a.name for a in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module in ROOMS:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module if node.module in ORDER else node.module.split(".")[0]


def test_six_scripts_stand_at_the_door_nobody_imports_the_tests_and_asserts_live_there_only():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == list(DOOR)
    assert set(MODULES) <= {*ORDER, "start"}
    assert not [name for name in MODULES if name.endswith("utils")]
    for name, tree in MODULES.items():
        assert not set(imports(tree)) & {"benchmarks", "conftest", "pytest", "tests"}, name
    for name, tree in MODULES.items():
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], name


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_only_from_places_further_down(name):
    own = [module for module in imports(MODULES[name]) if module in ORDER]
    place = ORDER.index(name) if name in ORDER else -1
    assert not [module for module in own if ORDER.index(module) <= place]


def test_the_command_line_imports_the_standard_library_only_until_the_flags_are_parsed():
    light = ("files.flags", "files.shell", "files.atomic")
    assert set(imports(MODULES["dilatedUnet"], only_top_level=True)) <= {*sys.stdlib_module_names, *light}
    for name in light:
        assert set(imports(MODULES[name])) <= sys.stdlib_module_names


def test_scores_studies_files_and_figures_import_without_keras_and_some_without_anything_heavy():
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n importlib.import_module(name); print(name, *sys.modules)"
    names = LIGHT + [name for name in WITHOUT_KERAS if name in MODULES]
    lines = python("-c", code, *names).stdout.splitlines()
    assert len(lines) == len(names)
    for i, (name, *loaded) in enumerate(map(str.split, lines)):
        assert not {module.split(".")[0] for module in loaded} & (HEAVY if i < len(LIGHT) else KERAS), name


def test_nothing_read_from_a_file_can_run_code():
    """No pickle, no loading of whole models, no Lambda layers, no eval: only numbers come out of a weight file."""
    forbidden = {"Lambda", "load_model", "pickle", "eval", "exec", "enable_unsafe_deserialization"}
    for name, tree in MODULES.items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not (names | set(imports(tree))) & forbidden, name
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            flags = {keyword.arg: keyword.value for keyword in call.keywords}
            if "allow_pickle" in flags:
                assert flags["allow_pickle"].value is False, name
            if ast.unparse(call.func) in ("np.load", "numpy.load"):
                assert "allow_pickle" in flags, f"{name}: {ast.unparse(call)}"


def test_nothing_is_drawn_from_a_global_generator():
    allowed = {"default_rng", "SeedSequence", "Generator", "SeedGenerator", "PCG64"}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"(np|numpy|keras)\.random\.\w+", ast.unparse(node)):
                assert node.attr in allowed, f"{name}: {ast.unparse(node)}"
        assert "random" not in imports(tree), name


def test_every_flag_is_consumed():
    """Each destination of the parser is read somewhere as args.<destination>, or by a name in a list of names."""
    import dilatedUnet

    verbs = dilatedUnet.build_parser().of_verb
    read, named = set(), set()
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
                read |= {node.attr} if isinstance(node.ctx, ast.Load) else set()
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and name == "train.run":
                named.add(node.value)  # recipe_of reads a list of fields by getattr
    recipe = {"elastic_grid", "elastic_sd_px", "max_rotation_deg", "max_shear_deg", "max_shift_px", "noise"}
    assert recipe <= named
    for verb, subparser in verbs.items():
        flags = {action.dest for action in subparser._actions} - {"help"}
        assert flags <= read | recipe, verb
        assert len(flags) > 0


def code_lines(function):
    """Lines of a function's body, without its docstring."""
    body = function.body[bool(ast.get_docstring(function)) :]
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_no_file_is_over_600_lines_and_no_function_over_40():
    long = [f"{file.relative_to(ROOT)}: {n}" for file in FILES if (n := len(file.read_text().splitlines())) > 600]
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and code_lines(node) > 40:
                long.append(f"{name}.{node.name}: {code_lines(node)}")
    assert not long
