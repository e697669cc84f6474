"""How large a pretraining is before anything is taken: what is measured here, and what follows from it."""
