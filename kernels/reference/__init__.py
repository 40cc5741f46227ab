"""What each operation means, in plain torch: correct on any device, tuned for CPUs."""
