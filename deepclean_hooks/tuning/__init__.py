"""Hyper-parameters chosen by trials on copies of the model."""
