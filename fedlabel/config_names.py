"""Error messages for unknown keys: other frameworks' names for a key, and keys of other sections or methods."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping

from fedlabel.config_schema import fields_of, hints
from fedlabel.methods import METHODS
from fedlabel.names import near, simple

CALLED_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    # The run.
    "random_state": ("seed",),
    "random_seed": ("seed",),
    "manual_seed": ("seed",),
    "rng": ("seed",),
    "gpu": ("device",),
    "gpus": ("device",),
    "cuda": ("device",),
    "use_cuda": ("device",),
    "accelerator": ("device",),
    "clients": ("num_clients",),
    "n_clients": ("num_clients",),
    "nb_clients": ("num_clients",),
    "client_num": ("num_clients",),
    "client_num_in_total": ("num_clients",),
    "num_users": ("num_clients",),
    "n_users": ("num_clients",),
    "num_parties": ("num_clients",),
    "n_parties": ("num_clients",),
    "num_partitions": ("num_clients",),
    "num_supernodes": ("num_clients",),
    "num_nodes": ("num_clients",),
    "rounds": ("num_rounds",),
    "n_rounds": ("num_rounds",),
    "nb_rounds": ("num_rounds",),
    "num_server_rounds": ("num_rounds",),
    "server_rounds": ("num_rounds",),
    "comm_round": ("num_rounds",),
    "comm_rounds": ("num_rounds",),
    "communication_rounds": ("num_rounds",),
    "global_rounds": ("num_rounds",),
    "global_epochs": ("num_rounds",),
    "epochs": ("num_rounds", "training.local_epochs"),
    "num_epochs": ("num_rounds", "training.local_epochs"),
    "n_epochs": ("num_rounds", "training.local_epochs"),
    "max_epochs": ("num_rounds", "training.local_epochs"),
    "frac": ("fraction_train",),
    "fraction": ("fraction_train",),
    "fraction_fit": ("fraction_train",),
    "fraction_clients": ("fraction_train",),
    "client_fraction": ("fraction_train",),
    "sample_fraction": ("fraction_train",),
    "participation": ("fraction_train",),
    "participation_rate": ("fraction_train",),
    "join_ratio": ("fraction_train",),
    "clients_per_round": ("fraction_train",),
    "num_clients_per_round": ("fraction_train",),
    "client_num_per_round": ("fraction_train",),
    "min_fit_clients": ("fraction_train",),
    "min_train_nodes": ("fraction_train",),
    # Who trains, and when a round ends.
    "sampler": ("sampling.kind",),
    "client_selection": ("sampling.kind",),
    "selection": ("sampling.kind",),
    "sample_mode": ("sampling.kind",),
    "overcommitment": ("pacing.over_selection",),
    "over_commit": ("pacing.over_selection",),
    "oversampling": ("pacing.over_selection",),
    "round_timeout": ("pacing.deadline",),
    "round_deadline": ("pacing.deadline",),
    "buffer_size": ("pacing.buffer",),
    "async_buffer": ("pacing.buffer",),
    "max_concurrency": ("fraction_train",),
    "staleness": ("pacing.staleness_exponent",),
    "mixing_alpha": ("pacing.mixing",),
    "fednova": ("strategy.normalize_steps",),
    # Data.
    "dataset": ("data.name",),
    "dataset_name": ("data.name",),
    "data_name": ("data.name",),
    "data_dir": ("data.root",),
    "data_path": ("data.root",),
    "data_root": ("data.root",),
    "dataset_dir": ("data.root",),
    "dataroot": ("data.root",),
    "datadir": ("data.root",),
    "path": ("data.root",),
    "dir": ("data.root",),
    "folder": ("data.root",),
    "file": ("data.root",),
    "csv": ("data.root",),
    "target": ("data.label_column",),
    "target_column": ("data.label_column",),
    "label": ("data.label_column",),
    "label_col": ("data.label_column",),
    "test_size": ("data.test_fraction",),
    "test_split": ("data.test_fraction",),
    "val_size": ("data.validation_fraction",),
    "val_split": ("data.validation_fraction",),
    "val_fraction": ("data.validation_fraction",),
    "validation_split": ("data.validation_fraction",),
    "validation_size": ("data.validation_fraction",),
    "num_samples": ("data.train_samples",),
    "n_samples": ("data.train_samples",),
    "max_samples": ("data.train_samples",),
    "train_size": ("data.train_samples",),
    "categorical_columns": ("data.categorical",),
    "categorical_features": ("data.categorical",),
    "cat_features": ("data.categorical",),
    "ignore_columns": ("data.drop_columns",),
    "drop": ("data.drop_columns",),
    "usecols": ("data.drop_columns",),
    # Partition.
    "alpha": ("partition.dirichlet_alpha",),
    "dir_alpha": ("partition.dirichlet_alpha",),
    "dirichlet": ("partition.dirichlet_alpha",),
    "beta_dirichlet": ("partition.dirichlet_alpha",),
    "concentration": ("partition.dirichlet_alpha",),
    "non_iid": ("partition.kind", "partition.dirichlet_alpha"),
    "noniid": ("partition.kind", "partition.dirichlet_alpha"),
    "iid": ("partition.kind",),
    "split": ("partition.kind", "evaluation.split"),
    "partitioner": ("partition.kind",),
    "partition_method": ("partition.kind",),
    "shards": ("partition.classes_per_client",),
    "shards_per_client": ("partition.classes_per_client",),
    "num_classes_per_client": ("partition.classes_per_client",),
    "min_size": ("partition.min_samples",),
    # Labels.
    "num_labels": ("supervision.labels_total",),
    "n_labels": ("supervision.labels_total",),
    "n_labeled": ("supervision.labels_total",),
    "num_labeled": ("supervision.labels_total",),
    "labeled_samples": ("supervision.labels_total",),
    "label_fraction": ("supervision.label_rate",),
    "label_ratio": ("supervision.label_rate",),
    "labeled_ratio": ("supervision.label_rate",),
    "labeled_fraction": ("supervision.label_rate",),
    "labelled_fraction": ("supervision.label_rate",),
    "shots": ("supervision.labels_per_class",),
    "num_shots": ("supervision.labels_per_class",),
    "noise_level": ("supervision.noise_rate",),
    "noise_ratio": ("supervision.noise_rate",),
    "noise_type": ("supervision.noise",),
    "flip_rate": ("supervision.noise_rate",),
    "partial_rate": ("supervision.partial_ratio",),
    "flip_probability": ("supervision.partial_ratio",),
    "epsilon": ("supervision.count_epsilon", "supervision.label_epsilon", "privacy.noise_multiplier"),
    "label_dp_epsilon": ("supervision.label_epsilon",),
    # Privacy, attacks and defences.
    "differential_privacy": ("privacy.kind",),
    "dp": ("privacy.kind",),
    "use_dp": ("privacy.kind",),
    "ldp": ("privacy.kind", "supervision.label_epsilon"),
    "noise_scale": ("privacy.noise_multiplier",),
    "sigma": ("privacy.noise_multiplier",),
    "noise_std": ("privacy.noise_multiplier",),
    "l2_norm_clip": ("privacy.clipping_norm",),
    "clipping_bound": ("privacy.clipping_norm",),
    "target_delta": ("privacy.delta",),
    "norm_bound": ("strategy.clip_update_norm",),
    "norm_threshold": ("strategy.clip_update_norm",),
    "defense": ("strategy.name",),
    "attack_type": ("attack.kind",),
    "byzantine_ratio": ("attack.share",),
    "malicious_ratio": ("attack.share",),
    "num_byzantine": ("attack.share", "strategy.args.num_malicious_nodes"),
    "labeling_functions": ("supervision.module",),
    # Augmentation and model.
    "randaugment": ("augment.num_ops", "augment.magnitude"),
    "rand_augment": ("augment.num_ops", "augment.magnitude"),
    "horizontal_flip": ("augment.flip",),
    "hflip": ("augment.flip",),
    "crop": ("augment.crop_padding",),
    "padding": ("augment.crop_padding",),
    "arch": ("model.name",),
    "architecture": ("model.name",),
    "backbone": ("model.name",),
    "net": ("model.name",),
    "network": ("model.name",),
    "encoder": ("model.name",),
    "norm_layer": ("model.norm",),
    "normalization": ("model.norm",),
    "batch_norm": ("model.norm",),
    "hidden_size": ("model.hidden",),
    "hidden_dim": ("model.hidden",),
    "hidden_units": ("model.hidden", "model.hidden_layers"),
    "hidden_layer_sizes": ("model.hidden_layers",),
    "layers": ("model.hidden_layers",),
    # Training.
    "lr": ("training.lr",),
    "learning_rate": ("training.lr",),
    "learningrate": ("training.lr",),
    "client_lr": ("training.lr",),
    "local_lr": ("training.lr",),
    "lr_local": ("training.lr",),
    "base_lr": ("training.lr",),
    "init_lr": ("training.lr",),
    "eta": ("training.lr", "strategy.args.eta"),
    "server_lr": ("strategy.args.eta",),
    "server_learning_rate": ("strategy.args.server_learning_rate",),
    "bs": ("training.batch_size",),
    "batch": ("training.batch_size",),
    "batchsize": ("training.batch_size",),
    "local_bs": ("training.batch_size",),
    "local_batch_size": ("training.batch_size",),
    "train_batch_size": ("training.batch_size",),
    "client_batch_size": ("training.batch_size",),
    "minibatch_size": ("training.batch_size",),
    "local_ep": ("training.local_epochs",),
    "local_epoch": ("training.local_epochs",),
    "num_local_epochs": ("training.local_epochs",),
    "client_epochs": ("training.local_epochs",),
    "e": ("training.local_epochs",),
    "steps": ("training.local_steps",),
    "num_steps": ("training.local_steps",),
    "iterations": ("training.local_steps",),
    "local_iterations": ("training.local_steps",),
    "local_updates": ("training.local_steps",),
    "optim": ("training.optimizer",),
    "opt": ("training.optimizer",),
    "wd": ("training.weight_decay",),
    "l2": ("training.weight_decay",),
    "weightdecay": ("training.weight_decay",),
    "grad_clip": ("training.max_grad_norm",),
    "clip": ("training.max_grad_norm",),
    "clip_norm": ("training.max_grad_norm", "privacy.clipping_norm"),
    "clip_grad_norm": ("training.max_grad_norm",),
    "gradient_clipping": ("training.max_grad_norm",),
    "mu": ("training.prox_mu", "training.unlabeled_ratio"),
    "proximal_mu": ("training.prox_mu",),
    "fedprox_mu": ("training.prox_mu",),
    "mu_ratio": ("training.unlabeled_ratio",),
    "uratio": ("training.unlabeled_ratio",),
    # Methods.
    "algorithm": ("method.name",),
    "algo": ("method.name",),
    "alg": ("method.name",),
    "threshold": ("method.confidence_threshold",),
    "tau": ("method.confidence_threshold",),
    "confidence": ("method.confidence_threshold",),
    "conf_threshold": ("method.confidence_threshold",),
    "p_cutoff": ("method.confidence_threshold",),
    "pcutoff": ("method.confidence_threshold",),
    "cutoff": ("method.confidence_threshold",),
    "t": ("method.temperature",),
    "temp": ("method.temperature",),
    "lambda": ("method.lambda_u", "method.lambda_0"),
    "lam": ("method.lambda_u", "method.lambda_0"),
    "ulb_loss_ratio": ("method.lambda_u", "method.lambda_0"),
    "unlabeled_weight": ("method.lambda_u", "method.lambda_0"),
    "warmup": ("method.warmup_rounds", "method.burn_in_rounds"),
    "warmup_epochs": ("method.warmup_rounds", "method.burn_in_rounds"),
    "ema_decay": ("method.mask.ema", "method.averaging_decay"),
    "ema_momentum": ("method.mask.ema", "method.averaging_decay"),
    "transition_matrix": ("method.matrix",),
    "noise_matrix": ("method.matrix",),
    # Devices.
    "device_conf_file": ("devices.trace",),
    "device_avail_file": ("devices.trace",),
    "trace_file": ("devices.trace",),
    "system_heterogeneity": ("devices.kind",),
    "duration_distribution_generator": ("devices.kind",),
    "stragglers": ("devices.kind",),
    "device_profiles": ("devices.population",),
    "availability": ("devices.available",),
    "drop_percent": ("devices.dropout_during",),
    "client_dropout": ("devices.dropout_during",),
    "dropout_rate": ("devices.dropout_during",),
    # Compression.
    "compressor": ("compression.up", "compression.down"),
    "compression_type": ("compression.up", "compression.down"),
    "quantization": ("compression.up", "compression.down"),
    "quantize": ("compression.up", "compression.down"),
    "quantizer": ("compression.up", "compression.down"),
    "num_bits": ("compression.up", "compression.down"),
    "compress_ratio": ("compression.share",),
    "compression_ratio": ("compression.share",),
    "sparsity": ("compression.share",),
    "sparsity_ratio": ("compression.share",),
    "topk": ("compression.share",),
    "topk_ratio": ("compression.share",),
    "error_compensation": ("compression.error_feedback",),
    # The rest.
    "aggregation": ("strategy.name",),
    "aggregator": ("strategy.name",),
    "server_optimizer": ("strategy.name",),
    "backend": ("grid.kind",),
    "runtime": ("grid.kind",),
    "workers": ("grid.num_workers",),
    "n_workers": ("grid.num_workers",),
    "n_jobs": ("grid.num_workers",),
    "jobs": ("grid.num_workers",),
    "num_cpus": ("grid.num_workers",),
    "processes": ("grid.num_workers",),
    "threads": ("grid.threads_per_worker",),
    "num_threads": ("grid.threads_per_worker",),
    "eval_every": ("evaluation.every",),
    "eval_interval": ("evaluation.every",),
    "eval_freq": ("evaluation.every",),
    "log_interval": ("evaluation.every",),
    "early_stopping": ("evaluation.select",),
    "patience": ("evaluation.select",),
    "monitor": ("evaluation.select",),
    "plots": ("evaluation.figures",),
    "save_every": ("checkpoint.every",),
    "save_freq": ("checkpoint.every",),
    "save_interval": ("checkpoint.every",),
    "keep_last": ("checkpoint.keep",),
}
"""What people call things in other libraries -> the keys here, the likeliest first."""

OPTIONS = {"out": "--out", "outdir": "--out", "outputdir": "--out", "logdir": "--out", "savedir": "--out"} | {
    "name": "--name",
    "runname": "--name",
    "expname": "--name",
    "experimentname": "--name",
    "resume": "--resume",
}
"""Simple names of what are options of the command, not keys."""

PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
"""Types of values that a configuration may hold."""

GIVEN_BY_DATA = (
    "numclasses",
    "nclasses",
    "inputshape",
    "inputdim",
    "inchannels",
    "imagesize",
    "imgsize",
    "numfeatures",
)
"""Simple names of what the data set says by itself."""


def all_keys(schema: type, method: type, prefix: str = "") -> list[str]:
    """Returns every full key below `schema`; where a field is called method, those of `method`."""
    keys = []
    for name in fields_of(schema):
        kind = method if name == "method" and not prefix else inner_schema(hints(schema)[name])
        keys += [f"{prefix}{name}"] if kind is None else all_keys(kind, method, f"{prefix}{name}.")
    return keys


def inner_schema(kind: object) -> type | None:
    """Returns the dataclass that a field's type is, also in a union with None; None for other types."""
    for each in (kind, *getattr(kind, "__args__", ())):
        if isinstance(each, type) and dataclasses.is_dataclass(each) and "tuple" not in str(kind):
            return each
    return None


def unknown_key(root: type, method: type, method_name: str, schema: type, where: str, name: str) -> str:
    """Returns the message for a key that does not exist.

    Args:
        root: the schema of the whole configuration.
        method: the schema of its method.
        method_name: of `method`, as the user gave it.
        schema: the schema that has no such field.
        where: its full key, "" for `root`.
        name: the key's last part.
    """
    full = f"{where}.{name}" if where else name
    of_method = where == "method" or where.startswith("method.")
    spelling = simple(name)
    if "." in name:
        head, _, rest = name.partition(".")
        return (
            f"`{full}` is not a configuration key: in a file a mapping stands for the dot, `{head}: {{{rest}: ...}}`."
        )
    if spelling in OPTIONS and not where:
        option = OPTIONS[spelling]
        return f"`{full}` is not a configuration key but an option of the command: {option}."
    if spelling in GIVEN_BY_DATA:
        return f"`{full}` is not a configuration key: the data set says it by itself. Leave it out."
    keys = all_keys(root, method)
    message = f"`{full}` is not a configuration key."
    if where == "method" and name in _attributes(method):
        value = getattr(method, name)
        kind = type(value).__name__ if value is not None else "float | None"
        return (
            f"`{full}`: {name} is an attribute of {method_name} but no field, as it has no type: write "
            f"{name}: {kind} = {value!r} in the class."
        )
    if of_method:
        path = full.partition(".")[2]
        owners = [
            each
            for each, kind in METHODS.items()
            if any(key == path or key.startswith(f"{path}.") for key in all_keys(kind, kind))
        ]
        message = f"`{full}` is not a field of {method_name}"
        message += f", but of {', '.join(owners)}." if owners else "."
    found = _meant(spelling, where, keys, schema)
    if found:
        return f"{message} Did you mean {' or '.join(found)}?"
    return f"{message} Allowed here: {', '.join(fields_of(schema))}."


def _attributes(kind: type) -> set[str]:
    """Returns the names of a class's attributes that are values without a type, so that a dataclass has no field of
    them.
    """
    typed = {name for each in kind.__mro__ for name in inspect.get_annotations(each)}
    values = {name for each in kind.__mro__[:-1] for name, value in vars(each).items() if isinstance(value, PLAIN)}
    return {name for name in values - typed if not name.startswith("_")}


def _meant(spelling: str, where: str, keys: list[str], schema: type) -> list[str]:
    """Returns the keys most similar to a name that `where` does not have, the most likely first."""
    leaves: dict[str, list[str]] = {}
    for key in keys:
        leaves.setdefault(simple(key.rpartition(".")[2]), []).append(key)
    here = [f"{where}.{each}" if where else each for each in fields_of(schema)]
    elsewhere = next((each for name, each in CALLED_ELSEWHERE.items() if simple(name) == spelling), ())
    matches = [key for key in elsewhere if key in keys or key.startswith("strategy.args.")] or leaves.get(spelling, [])
    if matches:
        return sorted(matches, key=lambda key: key not in here)[:3]
    near_here = near(spelling, [key.rpartition(".")[2] for key in here])
    if near_here:
        return [f"{where}.{near_here[0]}" if where else near_here[0]]
    far = near(spelling, leaves)
    return leaves[far[0]][:3] if far else []
