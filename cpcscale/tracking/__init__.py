"""The one door to MLflow: writing a run, keeping what a store that is away has missed, reading runs back."""
