"""What ``quire bench`` measures: quire beside its peers, on the same tokens, in turns."""
