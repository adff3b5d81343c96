"""The search itself: an Optuna study behind Ray Tune, its records, and the confirmed front."""
