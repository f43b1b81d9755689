"""What to do: conditions, the verdict, a schedule of k."""
