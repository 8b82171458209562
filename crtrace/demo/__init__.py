"""What ``crtrace demo`` shows: a program at work, and a judge that trusts nothing of ours."""
