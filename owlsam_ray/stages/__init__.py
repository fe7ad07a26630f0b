"""The steps inside the actor, one file each: decode · detect · suppress · segment · encode."""
