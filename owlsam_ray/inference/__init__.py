"""The engine inside the actor, and its steps, one file each: decode · detect · suppress · segment · encode."""
