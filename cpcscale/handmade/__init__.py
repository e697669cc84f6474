"""Features that are designed, not learnt: MFCC, log-mel, their statistics, prosody, and targets made of them."""
