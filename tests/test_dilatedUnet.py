"""The command line: flags, defaults, contradictions, exit codes, and what must not be imported to parse them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

import dilatedUnet
from dilatedUnet import parse
from files.shell import Terminated

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = (
    "--lr 0.00001 --max_lr 0.01 --epochs 500 --dilate_rate 1 --dilate 0 --weight_path weights/standard_unet.weights "
    "--addition 1",
    "--lr 0.00001 --max_lr 0.01 --epochs 500 --dilate_rate 2 --dilate 1 --weight_path weights/dilated_unet.weights "
    "--addition 1",
)


def flags_of(verb):
    actions = dilatedUnet.build_parser().of_verb[verb]._actions
    return {action.dest: action for action in actions if action.dest != "help"}


# -- verbs, flags, defaults


@pytest.mark.parametrize(("words", "dilate", "rate"), [(PUBLISHED[0], 0, 1), (PUBLISHED[1], 1, 2)])
def test_the_published_commands_parse_word_for_word(words, dilate, rate):
    args = parse(words.split())
    assert (args.verb, args.lr, args.max_lr, args.epochs) == ("train", 1e-5, 1e-2, 500)
    assert (args.dilate, args.dilate_rate, args.addition) == (dilate, rate, 1)
    assert (args.protocol, args.batch_size, args.steps_per_epoch, args.window) == ("published", 3, 10, 512)
    assert (args.optimizer, args.loss, args.clr_mode, args.step_size) == ("rmsprop", "bce_dice", "triangular", 2000)
    assert (args.dropout, args.classes, args.patience, args.filters) == (0.3, 2, 300, (44, 88, 176))


def test_every_flag_of_the_published_script_is_there_with_its_default():
    args = parse([])
    assert (args.epochs, args.classes, args.lr, args.max_lr) == (300, 2, 1e-5, 5e-4)
    assert (args.dilate, args.dilate_rate, args.addition) == (1, 1, 1)
    assert {"image_path", "mask_path", "weight_path", "gpu"} <= flags_of("train").keys()


def test_train_is_the_default_verb():
    assert parse(["--epochs", "4"]).verb == parse(["train", "--epochs", "4"]).verb == "train"
    assert parse(["train", "--epochs", "4"]).epochs == 4
    assert parse(["check"]).verb == "check"


@pytest.mark.parametrize("verb", dilatedUnet.VERBS)
def test_the_help_of_a_verb_is_written_to_stdout_and_says_what_every_flag_does(call, verb):
    done = call(verb, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"usage: dilatedUnet.py {verb}" in done.out
    assert all(action.help for action in flags_of(verb).values())


def test_the_help_of_the_program_opens_with_commands_and_lists_the_verbs(call):
    done = call("--help")
    assert done.code == 0
    for verb in dilatedUnet.VERBS:
        assert re.search(rf"^    {verb}\b", done.out, re.MULTILINE), verb
    assert "python dilatedUnet.py predict" in done.out


def test_help_imports_nothing_heavy(tmp_path):
    """What makes `--help` slow is what it imports; a time would depend on the machine."""
    code = (
        "import contextlib as c, sys, dilatedUnet\nwith c.suppress(SystemExit): dilatedUnet.main(['train', '--help'])"
    )
    code += "\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "--dilate_rate" in done.stdout
    loaded = {module.split(".")[0] for module in done.stdout.split("LOADED")[1].split()}
    assert "dilatedUnet" in loaded
    heavy = {"keras", "tensorflow", "jax", "torch", "scipy", "skimage", "matplotlib", "PIL", "tifffile", "pooch"}
    assert not loaded & {*heavy, "numba", "numpy"}


# -- refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 0", "argument --epochs: must be at least 1 and at most 1000000. Received: 0"),
        ("--epochs ten", "argument --epochs: must be a whole number. Received: ten"),
        ("--lr 0", "argument --lr: must be at least 1e-12 and at most 3.4e+38. Received: 0"),
        ("--lr -1", "argument --lr"),
        ("--lr nan", "argument --lr: must be at least 1e-12"),
        ("--lr inf", "argument --lr: must be at least 1e-12"),
        (f"--lr {'1' * 401}", "argument --lr: must be at least 1e-12"),
        (f"--seed {'1' * 401}", "argument --seed: must be at least 0 and at most 2147483647. Received: 1111"),
        ("--sigma 1e300", "argument --sigma: must be above 0 and at most 1000"),
        ("--batch_size 100000", "argument --batch_size: must be at least 1 and at most 1024"),
        ("--batch_size 1024 --window 4096", "--batch_size windows must hold at most 1073741824 px"),
        ("--val_windows 1000000000", "argument --val_windows: must be at least 1 and at most 1000"),
        ("--lr_find 1000000000", "argument --lr_find: must be at least 10 and at most 10000"),
        ("--distribute 1000", "argument --distribute: must be at least 1 and at most 64"),
        ("--folds 1000000000", "argument --folds: must be at least 2 and at most 1000"),
        ("--dilate_rate 1000000", "argument --dilate_rate: must be at least 1 and at most 64"),
        ("--filters 1000000000", "argument --filters: must be 1 to 8 whole numbers of at most 4096"),
        ("--gpu first", "argument --gpu: must be the number of a GPU"),
        ("--weight_path .", "argument --weight_path: must be a file, not a folder. Received: ."),
        ("--weight_path runs/..", "argument --weight_path: must be a file, not a folder"),
        ("--augment_preview .", "argument --augment_preview: must be a file, not a folder"),
        ("--run_dir=", "argument --run_dir: must be a path. Received: ''"),
        ("--image_path ~no-such-user/x.tif", "argument --image_path: must be a path: no home folder"),
        ("--dilate 2", "argument --dilate: invalid choice: 2"),
        ("--dropout 1", "argument --dropout: must be at least 0 and at most 0.95. Received: 1"),
        ("--classes 1", "argument --classes: must be at least 2"),
        ("--filters 4,x", "argument --filters: must be 1 to 8 whole numbers of at most 4096, such as"),
        ("--filters 4,0", "argument --filters: must be 1 to 8 whole numbers"),
        ("--optimizer lion", "argument --optimizer: invalid choice: 'lion'"),
        ("--clr_gamma 0", "argument --clr_gamma: must be above 0"),
        ("--folds 1", "argument --folds: must be at least 2"),
        ("--lr_find 3", "argument --lr_find: must be at least 10"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("predct --weight_path x", "fetch, check. Received: predct (did you mean predict?)"),
        ("predict --output x.png", "argument --output: must be a file that ends in .tif or .tiff or .zarr"),
        ("predict --output=", "argument --output: must be a path. Received: ''"),
        ("predict --weight_path w --tile 0", "argument --tile: must be at least 1 and at most 16384. Received: 0"),
        ("predict --weight_path w --threshold 1.5", "argument --threshold: must be at least 0 and at most 1"),
        ("predict --weight_path w --tta 5", "argument --tta: invalid choice: '5'"),
        ("fetch cifar", "invalid choice: 'cifar'"),
        # flags that contradict each other
        ("--val_sections 3-4", "--val_sections goes with --protocol holdout"),
        ("--val_sections 3-4 --protocol kfold", "--val_sections goes with --protocol holdout"),
        ("--fold 0", "--fold and --folds go with --protocol kfold"),
        ("--folds 3 --protocol holdout", "--fold and --folds go with --protocol kfold"),
        ("--gap 1", "--gap needs held-out sections"),
        ("--inner_sections 0", "--inner_sections goes with --protocol holdout or kfold"),
        ("--val_windows 3 --protocol holdout", "--val_windows goes with --protocol published"),
        ("--protocol holdout --inner_sections 0 --patience 3", "--patience needs validation"),
        ("--protocol all --patience 3", "--patience needs validation"),
        ("--arch unet2015 --filters 4,8", "--filters of unet2015 is one number"),
        ("--depth 3", "--depth, --padding and --batch_norm go with --arch unet2015"),
        ("--padding same", "--depth, --padding and --batch_norm go with --arch unet2015"),
        ("--arch unet2015 --loss bce --sigma 3", "--w0 and --sigma go with --loss weighted"),
        ("--w0 5", "--w0 and --sigma go with --loss weighted"),
        ("--instances --protocol holdout --invert_mask", "--invert_mask is of no use with --instances"),
        ("--instances", "--instances goes with --protocol holdout, kfold or all"),
        ("--step_size 5 --clr_mode none", "--step_size is of no use with --clr_mode none"),
        ("--step_size 5 --clr_mode cosine", "--step_size is of no use with --clr_mode cosine"),
        ("--clr_gamma 0.9", "--clr_gamma goes with --clr_mode exp_range"),
        ("--lr 0.1 --max_lr 0.01", "--max_lr must be at least --lr"),
        ("--lr 0.1", "--max_lr must be at least --lr"),
        ("--max_lr 0.1 --clr_mode none", "--max_lr is of no use with --clr_mode none"),
        ("--momentum 0.9 --optimizer adam", "--momentum goes with rmsprop and sgd"),
        ("--resume --force", "--resume goes on with a run and --force replaces it"),
        ("--lr_find --augment_preview x.png", "two different jobs"),
        ("--steps_per_epoch 10 --steps_per_execution 3", "--steps_per_execution must be a divisor"),
        ("--window 500", "--window must be a multiple of 8. Received: 500"),
        ("--window 8 --filters 1,1,1,1", "--window must be a multiple of 16. Received: 8"),
        ("--bn_momentum 1", "argument --bn_momentum: must be at least 0 and at most 0.9999"),
        ("--arch unet2015 --bn_momentum 0.9", "--bn_momentum goes with --batch_norm"),
        ("--recipe slow", "argument --recipe: invalid choice: 'slow'"),
        ("--recipe quick --fold 1", "go with --protocol kfold; --recipe quick sets --protocol holdout"),
        ("--recipe quick --step_size 9", "--step_size is of no use with --clr_mode cosine; --recipe quick sets"),
    ],
)  # fmt: skip
def test_bad_usage_is_refused_in_one_sentence_that_names_the_flag(refuses, tmp_path, flags, words):
    refuses(words, *flags.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        "--protocol kfold --fold 0 --folds 3 --gap 1 --inner_sections 0",
        "--protocol holdout --val_sections 3 --inner_sections 0 --patience 0",
        "--val_windows 3",
        "--clr_mode none --lr 0.1",
        "--clr_mode exp_range --clr_gamma 0.9 --step_size 7",
        "--optimizer rmsprop --momentum 0.5",
        "--steps_per_epoch 10 --steps_per_execution 5",
    ],
)
def test_flags_that_go_together_are_taken(flags):
    words = flags.split()
    args = parse(words)
    for name, value in zip(words[::2], words[1::2], strict=True):
        assert getattr(args, name[2:]) == type(getattr(args, name[2:]))(value)


# -- recipes


def differing(a, b):
    """The settings in which two command lines differ."""
    a, b = (vars(parse(words.split())) for words in (a, b))
    return {key: b[key] for key in a if a[key] != b[key]}.keys() - {"argv", "recipe"}


@pytest.mark.parametrize("name", dilatedUnet.RECIPES)
def test_a_recipe_is_what_its_flags_are_and_is_shown_where_one_looks(call, small, name):
    words = " ".join(f"--{key} {value}" for key, value in dilatedUnet.RECIPES[name].items())
    assert parse(["--recipe", name]).recipe == name
    assert not differing(words, f"--recipe {name}")
    for shown in (call("train", "--help").out, call("check", "--image_path", small / "images.tif").out):
        assert f"--recipe {name}: " in shown
        assert " ".join(words.split()[:4]) in shown


def test_the_published_recipe_is_what_the_published_commands_say():
    assert not differing("--lr 0.00001 --max_lr 0.01 --epochs 500", "--recipe published")


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--epochs 7", {"epochs"}),
        ("--protocol kfold --fold 1", {"protocol", "fold"}),
        ("--protocol all", {"protocol", "inner_sections"}),
        ("--protocol published", {"protocol", "inner_sections", "val_windows"}),
        ("--patience 5", {"patience", "inner_sections"}),
        ("--optimizer sgd", {"optimizer"}),
        ("--clr_mode none", {"clr_mode", "max_lr"}),
        ("--clr_mode triangular --step_size 5", {"clr_mode", "step_size"}),
        ("--arch unet2015", {"arch", "filters", "window", "loss"}),
        ("--ema 0", {"ema"}),
    ],
)
def test_a_flag_by_hand_wins_over_the_recipe(flags, changed):
    assert differing("--recipe quick", f"{flags} --recipe quick") == changed
    for name, value in zip(flags.split()[::2], flags.split()[1::2], strict=True):
        assert str(vars(parse(["--recipe", "quick", *flags.split()]))[name[2:]]) in (value, value + ".0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--image_path mine.tif", True),
        ("--image_path mine.tif --recipe quick", False),
        ("--image_path isbi2012", False),
    ],
)
def test_who_brings_sections_without_a_recipe_is_told_which_is_for_them(call, monkeypatch, words, said):
    monkeypatch.setattr(dilatedUnet, "look_for", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ("--recipe quick" in call(*words.split()).err) is said


def test_predict_takes_the_shipped_network_and_says_so_unless_another_is_named(call, monkeypatch):
    from predict import prediction

    taken = []
    monkeypatch.setattr(dilatedUnet, "load_backend", lambda args: None)
    monkeypatch.setattr(prediction, "run", lambda args: taken.append(args.weight_path) or 0)
    assert str(dilatedUnet.SHIPPED) in call("predict").err
    assert not call("predict", "--weight_path", "a", "b").err
    assert taken == [[str(dilatedUnet.SHIPPED)], ["a", "b"]]
    assert prediction.read_record(taken[0][0])["network"]["dilate"] is False


# -- exit codes


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "SIGTERM"),
        (MemoryError("Unable to allocate 6 GiB"), 2, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), 2, "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deep"),
    ],
)
def test_what_goes_wrong_becomes_an_exit_code_and_one_sentence(call, monkeypatch, error, code, words):
    def fail(args):
        raise error

    monkeypatch.setattr(dilatedUnet, "run_check", fail)
    done = call("check")
    assert done.code == code
    assert words in done.err
    assert len(done.err.splitlines()) == 1


def test_a_bug_shows_its_traceback(call, monkeypatch):
    """A ValueError out of the depths is no bad input: it must not be passed off as one."""

    def fail(args):
        raise ValueError("deep inside")

    monkeypatch.setattr(dilatedUnet, "run_check", fail)
    with pytest.raises(ValueError, match="deep inside"):
        call("check")


def test_a_refusal_is_exit_code_2_for_the_shell_too(suite, tmp_path):
    done = suite("--image_path", "nowhere.tif", "--mask_path", "nowhere.tif", code=2)
    assert done.stderr.splitlines()[-1].startswith("dilatedUnet.py: --image_path: nowhere.tif does not exist")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# -- check, fetch, evaluate


def test_check_says_what_the_files_are(call, small):
    done = call("check", "--image_path", small / "images.tif", "--mask_path", small / "labels.tif", "--window", "64")
    assert done.code == 0, done.err
    for words in ("10 sections of 64 x 80 px", "uint8", "255 = interior", "holdout: train on 0-7", "64 x 64 px"):
        assert words in done.out
    assert "problem" not in done.out


def test_check_turns_labels_that_mark_the_membrane(call, small):
    files = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif", "--window", "64")
    assert "255 = membrane" in call("check", *files, "--invert_mask").out


def test_check_of_images_alone_speaks_of_images_alone(call, small, tmp_path):
    for path in (small / "images.tif", folder_of_sections(tmp_path)):
        done = call("check", "--image_path", path, "--window", "64")
        assert done.code == 0, done.out
        assert "mask" not in done.out


def folder_of_sections(folder):
    folder = folder / "sections"
    folder.mkdir()
    for i in range(3):
        tifffile.imwrite(folder / f"{i}.tif", np.full((64, 72), i, np.uint8) + np.arange(72, dtype=np.uint8))
    return folder


def test_check_finds_the_labels_in_a_folder_with_the_challenges_files(call, small, tmp_path):
    for ours, theirs in (("images.tif", "train-volume.tif"), ("labels.tif", "train-labels.tif")):
        (tmp_path / theirs).write_bytes((small / ours).read_bytes())
    done = call("check", "--image_path", tmp_path, "--window", "64")
    assert done.code == 0, done.out
    assert "255 = interior" in done.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--window must fit into the sections"),
        ("--window 512", "--window must fit into the sections"),
        ("--recipe strong", "at most 64. Received: 512"),
        ("--window 60", "--window must be a positive multiple of 8"),
        ("--mask_path IMAGES", "must hold two label values"),
    ],
)
def test_check_ends_with_2_where_training_would_fail(call, small, flags, words):
    flags = flags.replace("IMAGES", str(small / "images.tif")).split()
    done = call("check", "--image_path", small / "images.tif", *flags)
    assert done.code == 2
    assert any(line.startswith("problem:") and words in line for line in done.out.splitlines())


def test_check_of_a_missing_file_is_refused(refuses):
    refuses("--image_path: nowhere.tif does not exist", "check", "--image_path", "nowhere.tif")


def test_fetch_prints_the_folder_of_a_data_set(call, monkeypatch, isbi):
    done = call("fetch", "isbi2012")
    assert done.code == 0
    assert done.out.strip() == str(isbi)


def test_fetch_without_a_connection_says_what_to_do(refuses, monkeypatch, tmp_path):
    from files import fetching

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setenv("DILATED_UNET_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "_download", offline)
    refuses("isbi2012 could not be fetched", "fetch", "isbi2012")
    assert not list(tmp_path.glob("cache/isbi2012/*"))


def test_fetch_knows_the_data_sets_that_can_be_fetched():
    from files import fetching

    assert set(dilatedUnet.DATA_SETS) == set(fetching.DATA_SETS) - {"synthetic"}


def test_evaluate_scores_a_prediction(call, small):
    labels = small / "labels.tif"
    done = call("evaluate", "--prediction", labels, "--mask_path", labels, "--scores", "dice,pixel_error")
    assert done.code == 0, done.err
    assert "1.0000" in next(line for line in done.out.splitlines() if line.lower().strip().startswith("dice"))
