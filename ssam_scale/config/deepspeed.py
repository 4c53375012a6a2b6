"""What a configuration must know of DeepSpeed."""

# Keys of DeepSpeed's configuration that other keys of ours, or the step itself, decide.
SAID_ELSEWHERE = {
    "train_batch_size": "data.batch_size says it",
    "train_micro_batch_size_per_gpu": "data.batch_size and train.accumulation say it",
    "gradient_accumulation_steps": "train.accumulation says it",
    "managed_gradient_accumulation": "each step tells DeepSpeed where its accumulation ends",
    "gradient_clipping": "optimizer.clip_grad_norm says it",
    "optimizer": "optimizer.name and its neighbours say it",
    "scheduler": "schedule.name and its neighbours say it",
    "zero_allow_untested_optimizer": "it is always on",
    "fp16": "train.precision says it",
    "bf16": "train.precision says it",
    "amp": "train.precision says it",
    "torch_autocast": "train.precision says it",
}

# timm's optimizers whose step for one weight depends on that weight alone. Beside those that look at whole tensors
# (LAMB, LARS, AdamP, Muon, Adafactor), the cautious variants do not: they scale by a mean over the tensor.
WEIGHT_BY_WEIGHT = {
    "sgd", "nesterov", "momentum", "sgdw", "nesterovw", "fusedsgd", "adam", "adamw", "adamwlegacy", "fusedadam",
    "fusedadamw", "adamax", "nadam", "nadamlegacy", "nadamw", "radam", "radamw", "radabelief", "adabelief", "adadelta",
    "adan", "adanw", "adopt", "adoptw", "laprop", "lion", "madgrad", "madgradw", "rmsprop", "rmsproptf", "rmsproptfw",
}  # fmt: skip
