"""The loop: steps of micro-batches, and an evaluation after every epoch."""

import sys
from argparse import Namespace
from time import perf_counter

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from training.checkpoint import Run, no_sums
from training.data import Data, derived_seed, own_micro_batches, test_batches, training_batches
from training.interrupt import Interrupt
from training.log import Log
from training.processes import accumulating, add_up, rank
from training.results import draw_curve

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def means(sums: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy."""
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return loss, accuracy


class Training:
    """A run on its way: ``run`` is where it stands, ``network`` what is called (the model, or its distributed form)."""

    def __init__(
        self,
        run: Run,
        network: nn.Module,
        scheduler: Scheduler,
        args: Namespace,
        data: Data,
        interrupt: Interrupt,
        log: Log,
    ):
        self.run, self.network, self.scheduler, self.args, self.data = run, network, scheduler, args, data
        self.interrupt, self.log = interrupt, log
        self.steps = len(data.train) // args.batch_size  # of an epoch
        self.mixup = None
        if args.mixup or args.cutmix:
            self.mixup = Mixup(args.mixup, args.cutmix, label_smoothing=0.0, num_classes=data.num_classes)
        self.sums = torch.zeros(3, device=args.device)  # since the last report, of this process
        self.reported_at = perf_counter(), run.step

    def to_the_end(self) -> None:
        """Train from where the run stands to its end, with a checkpoint after every epoch."""
        run, args = self.run, self.args
        batches = training_batches(self.data, args, run.step)
        images = {"initial": run.step * args.batch_size, "total": args.epochs * self.steps * args.batch_size}
        with tqdm(**images, unit=" images", dynamic_ncols=True, disable=rank() > 0) as self.bar:
            while len(run.history) < args.epochs:
                if run.step == (len(run.history) + 1) * self.steps:
                    self.end_epoch()
                    continue
                if run.step % args.log_every == 0:
                    self.interrupt.check()
                self.step(batches)
                save = args.save_every and run.step % args.save_every == 0
                if save or run.step % args.log_every == 0 or run.step % self.steps == 0:
                    self.report()
                if save:
                    run.save(args.output / "checkpoint.pt")

    def step(self, batches) -> None:
        """One step of the optimiser on the micro-batches of this process."""
        run, args = self.run, self.args
        run.model.train()
        self.scheduler.step_update(run.step)
        run.optimizer.zero_grad()
        micro_batches = own_micro_batches(args)
        for micro_batch in micro_batches:
            images, labels = (tensor.to(args.device, non_blocking=True) for tensor in next(batches))
            random_seed(derived_seed(args.seed, "step", run.step, micro_batch))
            if self.mixup:
                images, labels = self.mixup(images, labels)
            with accumulating(self.network, last=micro_batch == micro_batches[-1]):
                losses, sums = self.measure(self.network, images, labels)
                run.scaler.scale(losses.mean() / len(micro_batches)).backward()
            self.sums += sums
        if args.clip_norm:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.step += 1
        self.bar.update(args.batch_size)

    def measure(
        self, network: nn.Module, images: Tensor, labels: Tensor, count: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The losses of the first ``count`` images of a batch, and their part of the sums. Labels may be mixtures."""
        args = self.args
        with torch.autocast(args.device.type, PRECISIONS[args.precision], enabled=args.precision != "float32"):
            logits = network(images)
        logits, labels = logits[:count].float(), labels[:count]
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=args.label_smoothing)
        truth = labels.argmax(dim=1) if labels.ndim == 2 else labels
        hits = (logits.argmax(dim=1) == truth).sum()
        return losses, torch.stack([losses.detach().sum(), hits, hits.new_tensor(len(labels))])

    def report(self) -> None:
        """Gather the sums of all processes: for the bar, for the log, and to see that the loss is a number."""
        run, args = self.run, self.args
        sums = add_up(self.sums.cpu().double())
        self.sums.zero_()
        run.totals = run.totals + sums
        (loss, _), (mean_loss, accuracy) = means(sums), means(run.totals)
        if not torch.tensor(loss).isfinite():
            sys.exit(f"train.py: the loss is {loss} at step {run.step}; a smaller --lr may help")
        epoch = len(run.history) + 1
        self.bar.set_postfix(epoch=epoch, loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
        now, (then, step) = perf_counter(), self.reported_at
        speed = (run.step - step) * args.batch_size / (now - then)
        self.reported_at = now, run.step
        lr = max(group["lr"] for group in run.optimizer.param_groups)
        self.log.write(step=run.step, epoch=epoch, lr=lr, loss=loss, images_per_second=round(speed, 1))

    def end_epoch(self) -> None:
        """Evaluate, tell, and save."""
        run, args = self.run, self.args
        (loss, accuracy), (test_loss, test_accuracy) = means(run.totals), means(self.evaluate())
        run.history.append({"loss": loss, "accuracy": accuracy, "test_loss": test_loss, "test_accuracy": test_accuracy})
        epoch = len(run.history)
        self.log.write(step=run.step, epoch=epoch, **run.history[-1])
        if rank() == 0:
            self.bar.write(
                f"epoch {epoch}/{args.epochs}: training loss {loss:.3f}, accuracy {accuracy:.1%}; "
                f"held-out loss {test_loss:.3f}, accuracy {test_accuracy:.2%}"
            )
            draw_curve(run.history, args.label_smoothing, args.output / "curve.png")
        run.totals = no_sums()
        run.save(args.output / "checkpoint.pt")
        self.reported_at = perf_counter(), run.step

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The sums over the held-out images, each counted once."""
        self.run.model.eval()
        sums = torch.zeros(3, device=self.args.device)
        for images, labels, count in test_batches(self.data, self.args):
            self.interrupt.check()
            images, labels = images.to(self.args.device), labels.to(self.args.device)
            sums += self.measure(self.run.model, images, labels, count)[1]
        return add_up(sums.cpu().double())
