"""Experiments: their settings, checks of them, and the files that define them."""

from jgpt.config.experiment import (
  ComputeConfig,
  DataConfig,
  Expected,
  Experiment,
  Hyper,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
)

__all__ = [
  "ComputeConfig",
  "DataConfig",
  "Expected",
  "Experiment",
  "Hyper",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "SampleConfig",
  "TrainConfig",
]
