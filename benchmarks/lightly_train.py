"""yolo12n pretrained by LightlyTrain, as a file that our second stage starts from.

    python -m benchmarks.lightly_train --pictures FOLDER --python OTHER/bin/python \
        --minutes 10 --work FOLDER

LightlyTrain (AGPL-3.0) runs as a program, in an environment of its own that --python names, with
ultralytics, whose yolo12n it trains; nothing of it is imported here. SimCLR at 224 px with its own
defaults but for the batch. It first trains for two epochs, which say how long one takes; then,
anew, for as many as fit into the minutes, so that its schedule ends with them. Start-up,
checkpoints and export are not counted.

FOLDER/pretrained.safetensors has the backbone's tensors under their public names (neck and head
come out as random as they went in): `--init` takes it as it is, and so does an init of
benchmarks.label_efficiency (`weights: FILE, minutes: 10`). FOLDER/about.json says the epochs, and
how long they took. What is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# What the other program is told to do, in its own words. The last job's time of training is from
# its first batch to its last, by its own hooks.
PROGRAM = """
import json, sys, time
import lightly_train, pytorch_lightning, torch
from safetensors.torch import save_file

job = json.loads(sys.argv[1])
times = []
torch.set_num_threads(job["threads"])

def train(out, epochs):
    times.clear()
    fit = pytorch_lightning.Trainer.fit
    def timed(self, *args, **kwargs):
        class Clock(pytorch_lightning.Callback):
            def on_train_epoch_start(self, trainer, module): times.append(time.perf_counter())
            def on_train_epoch_end(self, trainer, module): times.append(time.perf_counter())
        self.callbacks.append(Clock())
        return fit(self, *args, **kwargs)
    pytorch_lightning.Trainer.fit = timed
    try:
        lightly_train.pretrain(
            out=out, data=job["pictures"], model="ultralytics/yolo12n.yaml", method="simclr",
            epochs=epochs, batch_size=job["batch"], num_workers=1, accelerator="cpu", devices=1,
            precision=job["precision"], seed=job["seed"], overwrite=True,
            transform_args={"image_size": (224, 224)},
        )
    finally:
        pytorch_lightning.Trainer.fit = fit
    return [last - first for first, last in zip(times[::2], times[1::2])]

if __name__ == "__main__":
    trial = train(job["out"] + "/trial", 2)
    epochs = max(1, round(job["minutes"] * 60 / trial[-1]))
    seconds = train(job["out"] + "/run", epochs)
    # From its checkpoint: what it exports is in half precision, which large statistics overflow.
    state = torch.load(
        job["out"] + "/run/checkpoints/last.ckpt", map_location="cpu", weights_only=False
    )["state_dict"]
    own = "embedding_model.wrapped_model._backbone."
    tensors = {"model." + name.removeprefix(own): tensor.contiguous()
               for name, tensor in state.items() if name.startswith(own)}
    save_file(tensors, job["out"] + "/pretrained.safetensors.new")
    about = {"epochs": epochs, "seconds": sum(seconds), "trial_seconds": trial, **job}
    json.dump(about, open(job["out"] + "/about.json", "w"), indent=1)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Pretrain, unless it is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lightly_train")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="of the other environment")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    file = options.work / "pretrained.safetensors"
    if file.is_file():
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    job = {
        "pictures": str(options.pictures.resolve()), "out": str(options.work.resolve()),
        "minutes": options.minutes, "batch": options.batch_size, "precision": options.precision,
        "threads": options.threads, "seed": options.seed,
    }  # fmt: skip
    quiet = {
        **os.environ, "YOLO_CONFIG_DIR": str(options.work.resolve()), "YOLO_OFFLINE": "true",
        "LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "OMP_NUM_THREADS": str(options.threads),
    }  # fmt: skip
    program = options.work / "program.py"  # a file: its data workers import it
    program.write_text(PROGRAM)
    with (options.work / "log.txt").open("w") as log:
        subprocess.run(
            [str(options.python.absolute()), str(program.resolve()), json.dumps(job)],
            check=True, cwd=options.work, env=quiet, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    (options.work / "pretrained.safetensors.new").rename(file)
    sys.stdout.write((options.work / "about.json").read_text() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
