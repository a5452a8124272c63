"""``llava-deploy report``: what says whether a bundle should be shipped, as JSON and as a page made of it."""
