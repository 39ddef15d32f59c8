"""A small web shop that hands its slow work to pgqueue; README.md says what each file shows."""
