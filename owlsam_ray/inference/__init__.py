"""The engine inside an actor, and its steps in one file each: decode · detect · suppress · segment · encode."""
