"""The rows from which the stories draw: who, what, where. Written for this project.

Each row is told apart by its `name`. Other fields are what the stories say of it, in the notation of
`template`; `reach` ties together what can be lost, where it goes, and who gets there.
"""

from lobit.demo.grammar import Row

_SHE = {"he": "she", "He": "She", "him": "her", "his": "her", "His": "Her", "child": "girl"}
_HE = {"he": "he", "He": "He", "him": "him", "his": "his", "His": "His", "child": "boy"}


def _named(women: str, men: str) -> tuple[Row, ...]:
    """Rows of names with their pronouns."""
    pairs = [(_SHE, name) for name in women.split(", ")] + [(_HE, name) for name in men.split(", ")]
    return tuple({"name": name, **pronouns} for pronouns, name in pairs)


def _rows(fields: str, table: str) -> tuple[Row, ...]:
    """Rows from a table: each line is a row, its fields separated by slashes.

    Two more fields follow from the name: `a`, with its article, and `start`, as it starts a sentence.
    """
    names = fields.split()
    lines = [[cell.strip() for cell in line.split(" / ")] for line in table.strip().splitlines()]
    rows = [dict(zip(names, line, strict=True)) for line in lines]
    return tuple(_forms(row["name"]) | row for row in rows)


def _forms(name: str) -> dict[str, str]:
    """The name with its article, and with a capital."""
    return {
        "a": f"{'an' if name.startswith(('a', 'e', 'i', 'o', 'u', 'honest')) else 'a'} {name}",
        "start": name[0].upper() + name[1:],
    }


CHILDREN = _named(
    "Mira, Nell, Anya, Rosa, June, Ivy, Pia, Hana, Dara, Zoe, Lotte, Esme",
    "Finn, Otto, Ravi, Hugo, Sami, Leo, Amir, Ned, Kofi, Luka, Emil, Piet",
)

ANIMAL_NAMES = _named("Moss, Dot, Fern, Bell, Daisy", "Tuck, Pip, Button, Star, Bo")

RELATIVES = _named("mother, grandmother, aunt, sister", "father, grandfather, uncle, brother")

KEEPERS = _named("Mrs Lark, Mrs Penny, Mrs Vane, Mrs Reed", "Mr Finch, Mr Crumb, Mr Stone, Mr Twist")

TRADES = _rows("name", "baker\nweaver\nfarmer\nmiller\npotter\nsailor")

TRAITS = _rows(
    "name moral",
    """
    shy / even a shy {hero.child} can ask for help
    brave / {hero} knew that the brave need friends too
    proud / {hero} was too wise to be proud
    quiet / the quiet {hero.child} had a story to tell
    curious / {hero} was more curious than ever
    honest / everyone trusted the honest {hero.child}
    careless / {hero} was not so careless any more
    cheerful / {hero} was twice as cheerful as before
    """,
)

PLACES = _rows(
    "name",
    """
    by the harbour
    in the valley
    near the market
    on a hill
    by the river
    under the bridge
    on an island
    behind the mill
    in the forest
    by the sea
    """,
)

COLOURS = _rows("name", "red\nblue\ngreen\nyellow\nsilver\ngolden\nwhite\nblack\norange\nbrown")

HOURS = _rows(
    "name later",
    """
    morning / By noon
    afternoon / Before dark
    evening / Late at night
    """,
)

TREATS = _rows(
    "name a",
    """
    bread / a loaf of bread
    soup / a bowl of soup
    cheese / a piece of cheese
    honey / a jar of honey
    cake / a slice of cake
    milk / a cup of milk
    nuts / a bag of nuts
    pie / a slice of pie
    """,
)

REACHES = _rows(
    "name went try fail",
    """
    high / [flew|was blown] / [jumped|threw a stick|climbed on a box|shook the wall] \
/ [it was too high|it did not move|{hero.his} arms were too short]
    water / [slid|fell] / [threw a stick|threw stones|took off {hero.his} boots|jumped from stone to stone] \
/ [it was too deep|it was too cold|it only went further away]
    narrow / [rolled|fell] / [reached in|used a stick|pushed with both hands|dug with a stone] \
/ [it was too dark|there was no room|{hero.he} found only dust]
    """,
)

THINGS = _rows(
    "name reach",
    """
    kite / high
    balloon / high
    scarf / high
    hat / high water
    boat / water
    raft / water
    ball / water narrow
    ring / narrow
    key / narrow
    bell / narrow
    coin / narrow
    """,
)

SPOTS = _rows(
    "name to reach",
    """
    at the top of a tree / to the top of a tree / high
    on the roof / onto the roof / high
    on the tower / onto the tower / high
    in the pond / into the pond / water
    in the stream / into the stream / water
    in the reeds / into the reeds / water
    in a rabbit hole / into a rabbit hole / narrow
    under the floor / under the floor / narrow
    between two stones / between two stones / narrow
    """,
)

BEASTS = _rows(
    "name reach skill did carry",
    """
    owl / high / fly in the dark / flew up / claws
    crow / high / fly in the wind / flew up / beak
    squirrel / high / climb a wall / climbed up / teeth
    otter / water / swim under water / swam out / mouth
    frog / water / jump from stone to stone / jumped out / mouth
    swan / water / swim in the cold / swam out / beak
    mouse / narrow / get under a door / ran in / teeth
    mole / narrow / dig in the dark / dug down / paws
    rat / narrow / find a way in the dark / ran in / paws
    """,
)

CRAFTS = _rows(
    "name part",
    """
    blanket / wool
    necklace / beads
    lamp / oil
    basket / straw
    drum / leather
    cake / honey
    flute / wood
    mask / paper
    """,
)

CHORES = _rows(
    "name did",
    """
    sweep the floor / swept the floor
    feed the hens / fed the hens
    carry the water / carried the water
    stack the wood / stacked the wood
    wash the windows / washed the windows
    count the sheep / counted the sheep
    """,
)

COUNTS = _rows("name", "two\nthree\nfour\nfive\nsix\nseven\neight\nnine")

YOUNG = _rows("name", "kitten\npuppy\nlamb\nduckling\nfox\ngoat")

CLUES = _rows(
    "name home",
    """
    straw / barn
    sand / beach
    mud / swamp
    flour / mill
    petals / garden
    snow / mountain
    leaves / forest
    paint / school
    """,
)

TOYS = _rows(
    "name broke with",
    """
    kite / the string broke / string
    doll / an arm came off / thread
    drum / the skin tore / leather
    book / a page tore / paper
    wagon / a wheel came off / nails
    basket / the handle came off / straw
    boat / the sail tore / thread
    swing / the rope broke / rope
    """,
)

ROOMS = _rows("name", "attic\ncellar\nkitchen\nstable\ntower\ngarden")

NOISES = _rows(
    "name did cause calm",
    """
    tapping / tapped / a crow that wanted soup / opened the window
    scratching / scratched / a mouse in a box / opened the box
    humming / hummed / a bee in a jar / opened the jar
    ringing / rang / a goat with a bell / took off the bell
    dripping / dripped / the rain on the floor / found a bucket
    squeaking / squeaked / the wind in the door / shut the door
    snoring / snored / the cat in a basket / shut the basket
    """,
)

FEARS = _rows("name", "ghost\nthief\ndragon\nwolf\nwitch\ngiant\nbear")
