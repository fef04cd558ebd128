"""Every fault a user can meet, row by row: ``make test`` runs a quick form, ``make test-faults``
the full one, whose figures are in RESULTS.md."""
