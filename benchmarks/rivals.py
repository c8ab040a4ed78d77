"""Other people's networks, trained in PyTorch, for `time_to_quality.py`, which starts this file for each of them.

SMP (segmentation_models_pytorch) Unet with ResNet-34 and with EfficientNet-B0, both from scratch, and MONAI BasicUNet
have no recipe of their own, so they get this suite's: its crops and warp, batches of 4 windows of 256 px, BCE + Dice,
Adam, a cosine from 1.5e-3, a warmed-up moving average of the weights, batch norm's momentum. Channels last. nnU-Net has
one, and keeps it: planning, preprocessing, augmentation, loss, SGD and polynomial decay; its planner sees sections of
256 px, so that its patch is that large. Where a schedule would count updates, it counts the time: it ends when the time
is up.

Before its clock starts, a rival makes a few updates with each number of threads and in each precision, takes what was
fastest, and forgets them. The clock stands still while it predicts and is scored.
"""

import copy
import json
import math
import os
import sys
import time
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from keras import ops

import augment
from network import losses
from predict.tiling import TRANSFORMS

WINDOW, BATCH = 256, 4
RATE, LAST_RATE, EMA = 1.5e-3, 1e-5, 0.98
BATCH_NORM = 0.1  # by how much a batch moves the statistics: 1 - `--bn_momentum`
PRECISIONS = ("float32", "bfloat16")


# -- networks that get this suite's recipe ------------------------------------------------------------------------


def smp_unet(encoder):
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet(encoder, encoder_weights=None, in_channels=1, classes=1)


def monai_unet():
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=1)


NETWORKS = {
    "SMP ResNet-34": partial(smp_unet, "resnet34"),
    "SMP EfficientNet-B0": partial(smp_unet, "efficientnet-b0"),
    "MONAI BasicUNet": monai_unet,
}


class OurRecipe:
    """A network of `NETWORKS`, trained as `--recipe quick` trains, on PyTorch."""

    def __init__(self, name, task, how):
        self.task, self.seed, self.tta = task, how["seed"], how["tta"]
        self.device, self.recipe, self.updates = ops.zeros(1).device, augment.recipe("all"), 0
        self.network = NETWORKS[name]().to(self.device, memory_format=torch.channels_last)
        for layer in self.network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = BATCH_NORM  # EfficientNet's own 0.01 would still hold its start at the end
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=RATE, eps=1e-7, fused=True)
        self.average = torch.optim.swa_utils.AveragedModel(self.network, multi_avg_fn=towards)
        self.parts, self.precisions = (self.network, self.optimizer, self.average), PRECISIONS

    def windows(self):
        """The next batch: images (B, 1, h, w) and masks (B, h, w)."""
        images, masks, first = self.task["images"], self.task["masks"], self.updates * BATCH
        keys = {"seed": self.seed, "epoch": 0, "indices": range(first, first + BATCH)}
        made = augment.batch(images, masks, self.recipe, **keys, window=WINDOW, sections=range(len(images)))
        made = {key: ops.convert_to_tensor(values) for key, values in made.items()}
        with torch.no_grad():
            image, mask = augment.warp(made, self.recipe, window=WINDOW, mean=self.task["mean"], std=self.task["std"])
        return image.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last), mask

    def update(self, done):
        """One update, when so much of the time is over, 0..1; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
        image, mask = self.windows()
        with autocast(self):
            logits = self.network(image)
        loss = losses.bce_dice(mask, logits[:, 0].float().sigmoid())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.updates += 1
        return loss.item()

    def predict(self, section):
        """Interior probability of a raw section (H, W), float32."""
        total = np.zeros(section.shape, np.float32)
        for turns, mirrored in TRANSFORMS[self.tta]:
            seen = np.rot90(section, turns)
            found = self.forward(seen[:, ::-1])[:, ::-1] if mirrored else self.forward(seen)
            total += np.rot90(found, -turns)
        return total / len(TRANSFORMS[self.tta])

    def forward(self, section):
        height, width = section.shape
        padded = np.pad(section, ((0, -height % 32), (0, -width % 32)), "reflect")
        x = np.float32((padded - self.task["mean"]) / self.task["std"])[None, None]
        x = torch.from_numpy(x).to(self.device, memory_format=torch.channels_last)
        network = self.average.module.eval()
        with torch.no_grad(), autocast(self):
            return network(x)[0, 0, :height, :width].float().sigmoid().cpu().numpy()


def towards(averages, weights, updates):
    """Move the average of the weights; of batch norm's statistics it holds the latest."""
    momentum = min(EMA, (1 + float(updates)) / (10 + float(updates)))
    torch._foreach_lerp_(averages, weights, 1 - momentum)


def autocast(rival):
    return torch.autocast(rival.device.type, torch.bfloat16, enabled=rival.precision == "bfloat16")


# -- nnU-Net ------------------------------------------------------------------------------------------------------


class NnUNet:
    """nnU-Net's 2-D network, by its own program, in the layout of folders that it asks for."""

    def __init__(self, name, task, how):
        for place in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{place}"] = str(Path(how["folder"], place))
        plan(Path(how["folder"], "raw", "Dataset001_EM"), task)
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.run.run_training import get_trainer_from_args

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precisions = PRECISIONS if self.device.type == "cpu" else ("float16",)  # on a GPU it has its own autocast
        self.trainer = trainer = get_trainer_from_args("1", "2d", "all", device=self.device)
        trainer.on_train_start()
        trainer.network.train()
        self.parts, self.updates = (trainer.network, trainer.optimizer), 0
        how = {"use_mirroring": how["tta"] != "none", "allow_tqdm": False}
        self.predictor = nnUNetPredictor(perform_everything_on_device=True, device=self.device, **how)
        described = (trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json, "nnUNetTrainer")
        self.predictor.manual_initialization(trainer.network, *described, trainer.inference_allowed_mirroring_axes)

    def update(self, done):
        self.trainer.lr_scheduler.step(done * self.trainer.num_epochs)
        with autocast(self):
            loss = self.trainer.train_step(next(self.trainer.dataloader_train))["loss"]
        self.updates += 1
        return float(loss)

    def predict(self, section):
        network = self.trainer.network
        self.trainer.set_deep_supervision_enabled(False)
        self.predictor.list_of_parameters = [network.state_dict()]
        with autocast(self):
            image = np.float32(section)[None, None]
            found = self.predictor.predict_single_npy_array(image, {"spacing": (999, 1, 1)}, None, None, True)[1]
        self.trainer.set_deep_supervision_enabled(True)
        network.train()
        return np.float32(found[1, 0])


def plan(folder, task):
    """Write the training sections as PNG files in nnU-Net's layout; plan and preprocess them."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from skimage import io

    class Planner(ExperimentPlanner):
        """For sections of `WINDOW` px, and so for a patch of that size."""

        def get_plans_for_configuration(self, spacing, median_shape, *rest):
            return super().get_plans_for_configuration(spacing, np.minimum(median_shape, WINDOW), *rest)

    for kind, sections in {"imagesTr/{:03d}_0000.png": task["images"], "labelsTr/{:03d}.png": task["masks"]}.items():
        (folder / kind).parent.mkdir(parents=True)
        for number, section in enumerate(sections):
            io.imsave(
                folder / kind.format(number),
                section.astype(np.uint8 if section.dtype == bool else section.dtype),
                check_contrast=False,
            )
    described = {"channel_names": {"0": "EM"}, "labels": {"background": 0, "interior": 1}, "file_ending": ".png"}
    described |= {"numTraining": len(task["images"])}
    (folder / "dataset.json").write_text(json.dumps(described))
    api.extract_fingerprint_dataset(1, num_processes=1)
    _, name = api.plan_experiment_dataset(1, Planner)
    api.preprocess_dataset(1, name, ("2d",), (1,))


# -- a rival's process ---------------------------------------------------------------------------------------------


def work(how):
    """Train, and whenever there is something to score, write predictions, say so and wait for a line on stdin."""
    told, _ = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)  # what libraries print goes to the log

    def say(**words):
        print(json.dumps(words), file=told, flush=True)

    task = {key: v if v.ndim else float(v) for key, v in np.load(Path(how["folder"], "task.npz")).items()}
    torch.manual_seed(how["seed"])
    rival = (OurRecipe if how["name"] in NETWORKS else NnUNet)(how["name"], task, how)
    packages = ("torch", "segmentation_models_pytorch", "monai", "nnunetv2", "keras")
    say(**choose(rival, how), versions={name: version(name) for name in packages})
    seconds, scored, limit = 0.0, 0.0, 60 * how["minutes"]
    while seconds < limit:
        begin = time.perf_counter()
        loss = rival.update(seconds / limit)
        seconds += time.perf_counter() - begin
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of update {rival.updates} is {loss}")
        if seconds >= limit or seconds - scored >= how["every"]:
            scored = seconds
            np.save(Path(how["folder"], "found.npy"), np.stack([rival.predict(s) for s in task["held_out"]]))
            say(seconds=seconds, updates=rival.updates)
            if not sys.stdin.readline():
                return


def choose(rival, how):
    """Set the threads and the precision that make the fastest updates, the best of three in turn; the weights stay."""
    states, seconds = [copy.deepcopy(part.state_dict()) for part in rival.parts], {}
    precisions = rival.precisions if how["precision"] == "auto" else (how["precision"],)
    for way in [*product(how["threads"], precisions)] * 3:
        torch.set_num_threads(way[0])
        rival.precision = way[1]
        begin = time.perf_counter()
        loss = rival.update(0.0)
        taken = time.perf_counter() - begin if math.isfinite(loss) else math.inf
        seconds[way] = min(taken, seconds.get(way, math.inf))
    for part, state in zip(rival.parts, states, strict=True):
        part.load_state_dict(state)
    rival.updates = 0
    threads, rival.precision = min(seconds, key=seconds.get)
    torch.set_num_threads(threads)
    measured = {f"{threads} threads, {precision}": round(s, 3) for (threads, precision), s in seconds.items()}
    return {"threads": threads, "precision": rival.precision, "seconds_an_update": measured}


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
