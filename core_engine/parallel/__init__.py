"""One model on several ranks: where each stands, and how they speak with each other."""
