"""The models that lm-eval sees; thin classes over HFLM."""
