"""All use of MLflow: writing runs, keeping records while the tracking store is away, reading runs back."""
