"""Other weights of the same shapes in the place of a projector's or a decoder's, in a bundle that is there already."""
