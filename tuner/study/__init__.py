"""What a study is: its configuration, files, events, trials, objectives and front. No Ray, torch or Optuna here."""
