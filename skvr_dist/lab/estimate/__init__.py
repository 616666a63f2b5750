"""What a rank of a run holds, sends and takes, in closed forms; and how good they are."""
