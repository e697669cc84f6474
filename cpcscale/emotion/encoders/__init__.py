"""Pretrained networks whose layers are the input of recognisers."""
