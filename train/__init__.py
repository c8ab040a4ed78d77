"""Training: one run, what it is fed, what happens after every epoch, its record, its end."""
