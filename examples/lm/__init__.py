"""The parts of the example language model; `train_lm.py` puts them together."""
