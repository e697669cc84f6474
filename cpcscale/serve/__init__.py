"""Recognisers as people take them away: a folder that is saved, checked and loaded, and applied to audio."""
