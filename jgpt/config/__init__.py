"""What an experiment is, and changing one by name."""

from jgpt.config.experiment import (
  DataConfig,
  Expected,
  Experiment,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  SampleConfig,
  TrainConfig,
)

__all__ = [
  "DataConfig",
  "Expected",
  "Experiment",
  "MeshConfig",
  "ModelConfig",
  "OptimizerConfig",
  "SampleConfig",
  "TrainConfig",
]
