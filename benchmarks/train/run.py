"""The training loop: a checkpoint holds its whole state, and a step is a function of that state.

All random numbers of a step follow from the seed, the step's number and the process, and the images from the seed and
the epoch, so no random generator's state has to be kept.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2
from tqdm import tqdm

from whiten_layers import follow_learning_rate, load_window_state_dict, window_state_dict

from .batches import Batch, loaders
from .datasets import STEP, Data, mixed
from .distillation import Teacher, soft_loss
from .errors import Unusable, one_line
from .network import bad_batches, make_network, plain_view, wrap
from .optimizing import make_optimizer, set_rate
from .options import ImageOptions, Options, given, of_the_run
from .record import CHECKPOINT, FORMAT, Record, Row, check_same, load, save
from .video_splits import VIDEOS
from .world import Stop, World

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def mixing(options: ImageOptions, num_classes: int) -> v2.Transform | None:
    """MixUp or CutMix of a batch, or one of both at random; None if neither is chosen."""
    kinds = [(v2.MixUp, options.mixup), (v2.CutMix, options.cutmix)]
    chosen = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    return v2.RandomChoice(chosen) if chosen else None


class Run:
    """A training run in progress.

    Its state is the network with its whitening statistics, the optimizer, the loss scaler, the average of the weights,
    the number of the epoch and of the step in it, the epoch's sums so far, and the figures of the epochs before.
    """

    def __init__(self, options: Options, data: Data, world: World, teacher: Teacher | None = None) -> None:
        self.options, self.world, self.path = options, world, given(options.out) / CHECKPOINT
        self.optimization, self.distillation, machine = options.optimization, options.distillation, options.machine
        self.about: dict[str, int | str] = {"training images": len(data.train), "test images": len(data.test)}
        self.about["classes"] = data.num_classes
        takes_clips = options.images.dataset in VIDEOS
        self.teacher = teacher
        if teacher is not None:
            teacher.check(data.num_classes, takes_clips)
            self.about["teacher's weights"] = teacher.digest()
        channels_last = torch.channels_last_3d if takes_clips else torch.channels_last
        self.layout = channels_last if machine.channels_last else torch.contiguous_format
        torch.manual_seed(options.seed)
        network = make_network(data.num_classes, options).to(world.device)
        network.to(memory_format=self.layout)
        self.network, self.view = network, plain_view(network)
        self.average: AveragedModel | None = None
        if self.optimization.ema is not None:
            average = get_ema_multi_avg_fn(self.optimization.ema)
            self.average = AveragedModel(self.view, multi_avg_fn=average, use_buffers=True)
        self.optimizer = make_optimizer(network, self.optimization)
        follow_learning_rate(network, self.optimizer)
        kind = world.device.type
        self.scaler = torch.amp.GradScaler(kind, enabled=machine.precision == "fp16")  # type: ignore[attr-defined]
        self.autocast = torch.autocast(kind, PRECISIONS[machine.precision], enabled=machine.precision != "fp32")
        self.model = wrap(network, world, machine.compile)
        self.mix = mixing(options.images, data.num_classes)
        self.shares, self.train_batches, self.test_batches = loaders(data, options, world)
        self.epoch = self.step = 0
        self.rows: list[Row] = []
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)  # loss, correct, images
        self.seconds = 0.0

    # State

    def save(self) -> None:
        """Write the checkpoint."""
        windows = {name: part.cpu() for name, part in window_state_dict(self.network).items()}
        processes = self.world.gathered({"sums": self.sums.cpu(), "windows": windows})
        state = {
            "format": FORMAT,
            "run": of_the_run(self.options) | self.about,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "rows": self.rows,
            "processes": processes,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        self.world.together(lambda: save(self.path, state) if self.world.rank == 0 else None)

    def restore(self) -> None:
        """Restore the state that the checkpoint holds.

        With the same number of processes training continues bit for bit. With another number the observations of
        whitened layers since their last refresh are dropped.

        Raises:
            Unusable: it is damaged, or of another run.
        """
        state = self.world.together(lambda: load(self.path))
        self.world.together(lambda: check_same(self.path, state["run"], of_the_run(self.options) | self.about))
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.step, self.seconds, self.rows = (state[n] for n in ("epoch", "step", "seconds", "rows"))
        processes = state["processes"]
        if len(processes) == self.world.size:
            here = processes[self.world.rank]
            self.world.together(lambda: self._load_windows(here["windows"]))
            self.sums.copy_(here["sums"])
        elif self.world.rank == 0:
            self.sums.copy_(sum(process["sums"] for process in processes))

    def _load_windows(self, windows: dict[str, Tensor]) -> None:
        try:
            load_window_state_dict(self.network, windows)
        except ValueError as error:
            raise Unusable(f"{self.path} does not fit the network: {one_line(error)}") from error

    def progress(self) -> str:
        """Describe the progress: epochs and steps done."""
        return f"{self.epoch} of {self.optimization.epochs} epochs and {self.step} of {self.shares.steps} steps done"

    # Training

    def fit(self, record: Record | None, stop: Stop) -> bool:
        """Train and record every epoch; return True at the end, and False if a signal stopped the run."""
        while self.epoch < self.optimization.epochs:
            try:
                trained = self._train(stop)
                tested = None if trained is None else self._test(stop)
            except Unusable:  # an image; all processes have come to the same step
                self.save()
                raise
            if trained is None or tested is None:
                self.save()
                return False
            self.rows.append({**trained, **tested, **bad_batches(self.network)})
            self.epoch, self.step = self.epoch + 1, 0
            self._begin_epoch()
            # In this order, so that an epoch that is interrupted in between is done, and told of, again.
            self.world.together(lambda: record.epoch(self.rows) if record else None)
            self.save()
        return True

    def _train(self, stop: Stop) -> Row | None:
        """Train for the rest of the epoch; return its figures, or None if a signal stopped it."""
        self.shares.epoch, self.shares.start = self.epoch, self.step
        batches = iter(self.train_batches)
        self.model.train()
        start = time.perf_counter() - self.seconds
        with self._bar("train", self.shares.steps, self.step) as bar:
            while self.step < self.shares.steps:
                parts, error = self._parts(batches)
                if stop.agreed(error):
                    self.seconds = time.perf_counter() - start
                    return None
                loss = self._step(parts)
                self.step += 1
                if not bar.disable and (self.world.device.type == "cpu" or self.step % 10 == 0):  # a GPU is waited for
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
        loss, correct, images = self.world.sum(self.sums.clone()).tolist()
        self.seconds = time.perf_counter() - start
        return {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "seconds": self.seconds,
            "images_per_second": images / self.seconds,
        }

    def _bar(self, what: str, total: int, done: int = 0) -> tqdm:
        name = f"epoch {self.epoch + 1}/{self.optimization.epochs} {what}"
        often = {"mininterval": 0.1 if sys.stderr.isatty() else 30}  # seconds: not to fill a log
        shape = {"unit": "step", "leave": False, "dynamic_ncols": True, **often}
        return tqdm(desc=name, total=total, initial=done, disable=self.world.rank > 0, **shape)

    def _parts(self, batches: Iterator[Batch | Unusable]) -> tuple[list[Batch], Unusable | None]:
        """Load the images of a step's backward passes, and return the first error among them."""
        parts = [next(batches) for _ in range(self.optimization.accumulate)]
        errors = [part for part in parts if isinstance(part, Unusable)]
        return [part for part in parts if not isinstance(part, Unusable)], errors[0] if errors else None

    def _step(self, parts: list[Batch]) -> Tensor:
        """Take a step of the optimizer; return the loss of its last part."""
        number = self.epoch * self.shares.steps + self.step
        torch.manual_seed(mixed(STEP, self.options.seed, number, self.world.rank))
        set_rate(self.optimizer, number, self.shares.steps, self.optimization)
        self.optimizer.zero_grad()
        loss = torch.zeros(())
        for place, part in enumerate(parts, start=1):
            images, labels, *others = self._moved(part)
            if self.mix is not None:
                images, labels = self.mix(images, labels)
            alone = self.world.size == 1 or place == len(parts)
            with nullcontext() if alone else self.model.no_sync():  # type: ignore[operator]
                with self.autocast:
                    outputs = self.model(images)
                    loss = F.cross_entropy(outputs, labels, label_smoothing=self.optimization.label_smoothing)
                    if self.teacher is not None:
                        loss = self._taught(self.teacher, loss, outputs, others[0] if others else images)
                self.scaler.scale(loss / len(parts)).backward()
            with torch.no_grad():
                classes = labels if labels.ndim == 1 else labels.argmax(1)
                correct = (outputs.argmax(1) == classes).sum()
                self.sums += torch.stack([loss * len(images), correct, torch.full_like(loss, len(images))])
        if self.optimization.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.optimization.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.view)
        return loss.detach()

    def _taught(self, teacher: Teacher, loss: Tensor, outputs: Tensor, images: Tensor) -> Tensor:
        """The loss with the teacher's part in it, who is shown its own view of the images."""
        with torch.no_grad():
            taught = teacher.network(images)
        weight = given(self.distillation.distill_weight)
        soft = soft_loss(outputs, taught, given(self.distillation.temperature))
        return (1 - weight) * loss + weight * soft

    def _moved(self, batch: Batch) -> Batch:
        images, labels, *others = (part.to(self.world.device, non_blocking=True) for part in batch)
        return images.contiguous(memory_format=self.layout), labels, *others

    # Testing

    @torch.no_grad()
    def _test(self, stop: Stop) -> Row | None:
        """Test the network and the average of its weights; return the figures, or None if a signal stopped it."""
        networks = {"test": self.view} | ({} if self.average is None else {"ema": self.average.module})
        for network in networks.values():
            self.world.follow_first(network.buffers())  # batch normalization's are each process's own
            network.eval()
        sums = torch.zeros(len(networks), 4, dtype=torch.float64, device=self.world.device)
        with self._bar("test", len(self.test_batches)) as bar:
            for batch in self.test_batches:
                failed = isinstance(batch, Unusable)
                if stop.agreed(batch if failed else None):
                    return None
                if batch is not None:
                    images, labels, *_ = self._moved(batch)
                    for network, figures in zip(networks.values(), sums, strict=True):
                        with self.autocast:
                            outputs = network(images)
                        figures += scores(outputs.float(), labels)
                bar.update()
        row: Row = {}
        for name, (loss, first, fifth, images) in zip(networks, self.world.sum(sums).tolist(), strict=True):
            row |= {f"{name}_loss": loss / images, f"{name}_accuracy": first / images, f"{name}_top5": fifth / images}
        return row

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """State dicts of the plain network and of the average, if there is one, by the name of their file."""
        files = {"weights.pt": self.view.state_dict()}
        if self.average is not None:
            files["weights_ema.pt"] = self.average.module.state_dict()
        return files


def scores(outputs: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses, the numbers of top-1 and top-5 hits, and the number of images."""
    best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == labels.unsqueeze(1)
    loss = F.cross_entropy(outputs, labels, reduction="sum")
    return torch.stack([loss, best[:, 0].sum(), best.sum(), torch.full_like(loss, len(labels))])
