"""Lanes: long-lived Ray Train runs that load the frozen encoder once and serve many light Tune trials."""
