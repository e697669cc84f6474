"""Waveform to z (encoder) and c (context), and the predictors that pretraining uses."""
