"""Train an image classifier: a small backbone declared here, or any model of timm's.

    python examples/train.py                                # handwritten digits, about two minutes on two cores
    python examples/train.py --model convnext_atto          # a peer, on the same data
    python examples/train.py --model transnext_micro --data cifar100 PATH --epochs 100
    python examples/train.py --resume runs/digits           # go on after Ctrl-C, a kill or a power cut

The paper's recipe, on one machine's eight GPUs (the same command trains on CPUs, or on many machines):

    torchrun --nproc-per-node 8 examples/train.py --model transnext_tiny --data folder /data/imagenet \\
        --recipe imagenet --precision bfloat16 --workers 12

The output folder gets model.safetensors, curve.png, receptive_field.png, log.jsonl and checkpoint.pt. Every random
choice follows from the seed and the position in the run, so a run that was stopped and resumed ends in the same
weights: to the bit on the CPU, on a GPU as far as its kernels repeat themselves.
"""

import sys

from common.refusals import refuse, refuse_missing

if __name__ == "__main__":
    refuse_missing("--weights")

import torch
from timm.utils import random_seed

from foveal.analysis import count_parameters
from training.arguments import NOT_SETTINGS, parse_args
from training.checkpoint import Run
from training.data import open_data
from training.interrupt import Interrupt, Stopped
from training.log import Log
from training.loop import Training
from training.model import build_model, build_optimizer, build_scheduler
from training.processes import distribute, join, leave, rank
from training.results import write_results


def main(argv: list[str] | None = None) -> int:
    join()
    args, checkpoint = parse_args(argv, description=__doc__)
    interrupt = Interrupt()
    data = open_data(args)
    if args.batch_size > len(data.train):
        refuse("--batch-size", f"must be at most the number of training images, {len(data.train)}")
    random_seed(args.seed)
    model = build_model(args, data.num_classes, data.in_chans, weights=not checkpoint).to(args.device)
    size = count_parameters(model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    network = distribute(model, args.engine, args.compile)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "float16")
    run = Run(settings, model, build_optimizer(args, model), scaler)
    scheduler = build_scheduler(args, run.optimizer, steps=len(data.train) // args.batch_size)
    if checkpoint:
        run.load(checkpoint)
    args.output.mkdir(parents=True, exist_ok=True)
    run.save(args.output / "checkpoint.pt")
    log = Log(args.output, run, args.tensorboard)
    name, start = args.model or "small backbone", f"from step {run.step} " if run.step else ""
    say(f"{name}, {size:,} parameters, {len(data.train)} images, {start}into {args.output}")
    try:
        Training(run, network, scheduler, args, data, interrupt, log).to_the_end()
    except Stopped:
        run.save(args.output / "checkpoint.pt")
        say(f"Stopped after step {run.step}. Go on with: python {sys.argv[0]} --resume {args.output}")
        leave()
        return 130
    finally:
        log.close()
    weights = run.weights()
    if rank() == 0:
        model = build_model(args, data.num_classes, data.in_chans)
        model.load_state_dict(weights)
        write_results(model.to(args.device), args, data.test)
    say(f"Held-out accuracy {run.history[-1]['test_accuracy']:.2%}. Weights and pictures are in {args.output}")
    leave()
    return 0


def say(text: str) -> None:
    if rank() == 0:
        print(text)


if __name__ == "__main__":
    sys.exit(main())
