"""The vocabulary everything is made of: names, places, things, and who is what.

Owns word lists only; what is said with them is in `stories.py`, `facts.py` and `skills.py`. All of it was
written for this project.
"""

from __future__ import annotations

GIRLS = """Ada Alma Anna Astrid Bea Birgit Carla Clara Daria Dina Edda Ella Elsa Emma Esther Eva Fatima Flora Freya
Gerda Greta Hanna Helga Ida Ines Iris Jana Julia Karin Kira Lara Lena Lily Lola Lucia Luna Maja Mara Maria Marta Mia
Mila Mina Nadia Nina Nora Olga Paula Petra Rita Rosa Ruth Sara Sofia Tara Tilda Vera Wanda Yara Zoe""".split()

BOYS = """Aaron Adam Albert Anton Arno Ben Boris Bruno Carl Daniel David Elias Emil Eric Felix Finn Frank Fred Georg
Gustav Hans Henry Hugo Igor Ivan Jakob Jan Jonas Josef Juan Karl Kaspar Kurt Leo Leon Lucas Luis Malik Marco Martin Max
Milo Nico Niels Noah Olaf Omar Oscar Otto Pablo Paul Peter Rafael Remy Robin Samir Simon Theo Tim Tom Uwe Victor
Walter Yusuf""".split()

CITIES = """Amman Antwerp Athens Bergen Berlin Bern Bogota Boston Bristol Cairo Chicago Cork Dakar Dallas Delhi Denver
Dresden Dublin Florence Geneva Genoa Ghent Hamburg Hanoi Havana Helsinki Kyoto Lagos Leeds Lima Lisbon London Lyon
Madrid Malmo Manila Marseille Miami Milan Montreal Munich Nairobi Naples Osaka Oslo Paris Porto Prague Quito Riga Rome
Seattle Seoul Seville Sofia Stockholm Sydney Tallinn Tokyo Toronto Tunis Turin Utrecht Valencia Vienna Vilnius Warsaw
York Zagreb Zurich""".split()

COUNTRIES = """Argentina Australia Austria Belgium Bolivia Brazil Canada Chile China Cuba Denmark Ecuador Egypt Finland
France Germany Ghana Greece Hungary Iceland India Iran Ireland Italy Japan Kenya Mexico Morocco Nepal Nigeria Norway
Peru Poland Portugal Romania Spain Sweden Syria Thailand Tunisia Turkey Uganda Ukraine Vietnam""".split()

ANIMALS = """ant badger bat bear beaver bee beetle bird boar bull butterfly camel cat cow crab cricket crow deer dog
donkey dove dragon duck eagle elephant falcon ferret fish fox frog goat goose hare hawk hedgehog hen horse kitten lamb
lion lizard lynx magpie mole monkey moose mouse newt otter owl ox parrot penguin pig pigeon pony puppy rabbit rat raven
robin rooster salmon seal sheep snail snake sparrow spider squirrel stork swallow swan tiger toad tortoise turtle
weasel whale wolf wren""".split()

JOBS = """baker builder carpenter clockmaker cook dancer doctor driver farmer fiddler fisher gardener guard hunter
judge king knight librarian mason miller miner musician nurse painter pilot poet potter prince princess queen sailor
scholar shepherd shoemaker singer smith soldier tailor teacher weaver wizard writer""".split()

THINGS = """acorn anchor apple arrow bag ball banner barrel basket bell blanket boat book boot bottle bowl box branch
bread brick bridge broom brush bucket button cage cake candle cap card cart chain chair chest clock cloak coat coin
comb compass cookie crown cup curtain diary dish doll door drum egg fan feather fence fiddle flag flute fork gate gift
glass globe glove hammer harp hat helmet hook horn jar jewel kettle key kite knife ladder lamp lantern leaf lens letter
lock map marble mask medal mirror mitten nail necklace needle nest net nut oar orange paddle pan parcel pear pearl pen
pencil pillow pin pipe plate plum pot pumpkin purse puzzle quilt ribbon ring rock rope rug saddle sail sandal scarf
seed shell shield shoe shovel sled spoon stamp star statue stick stone stool sword table teapot tent thimble
thread ticket torch tower toy trumpet trunk umbrella vase violin wagon watch wheel whistle window wreath""".split()

COLORS = "amber black blue brown crimson golden green grey ivory orange pink purple red silver white yellow".split()

SIZES = "big broad enormous little long narrow short slim small tall thick thin tiny wide".split()

QUALITIES = """ancient beautiful bright broken cheap clean clever cold cool cracked crooked curious dark dear dusty easy
empty fine fresh gentle heavy hidden hollow lost loud lovely lucky magic mended muddy new noisy odd old painted plain
polished proud quiet rare rough round rusty sharp shiny simple smooth soft sour special square stiff strange strong
sturdy sweet torn ugly useful warm wet wild wonderful wooden worn""".split()

TEMPERS = """brave busy careful cheerful clumsy curious eager friendly gentle grumpy honest hungry kind lazy lively
lonely merry modest patient playful polite proud quiet restless shy silent sleepy stubborn thoughtful wise""".split()

PLACES = """barn bay beach brook camp castle cave cellar church cliff cottage desert farm field forest garden harbor
hill hut inn island kitchen lake library lighthouse market meadow mill mine mountain orchard palace park path pond port
pub quarry river road school shore square stable stream street swamp temple theater town tunnel valley village well
wood workshop yard""".split()

FOODS = """apples bananas beans berries biscuits bread butter cabbage cake carrots cheese cherries chocolate coffee
cookies corn eggs figs fish flour garlic grapes ham honey jam juice lemons lettuce melons milk mushrooms nuts oats 
olives onions oranges pasta peaches pears peas pepper plums potatoes pumpkins rice salad salt soup spinach sugar tea
tomatoes walnuts""".split()

GOODS = """bags batteries blankets books bottles boxes brushes buckets buttons cables candles caps cards chairs clocks
coats cups desks folders forks gloves hammers hats helmets jars kettles keys knives ladders lamps lanterns maps markers
masks mirrors mugs nails notebooks pans papers pencils pens pillows plates pots radios ribbons rings ropes rugs scarves
screws shirts shoes shovels socks spoons stamps tables tents tickets tiles towels toys umbrellas vases watches
wheels""".split()

ROOMS = "kitchen bedroom bathroom hall office cellar garage".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = "spring summer autumn winter".split()
WEATHERS = "sunny rainy cloudy windy snowy foggy stormy clear".split()
LANGUAGES = (
    "Arabic Czech Danish Dutch English Finnish French German Greek Hindi Italian Japanese Korean Latin \
Norwegian Polish Portuguese Russian Spanish Swedish Turkish".split()
)
INSTRUMENTS = "cello clarinet drum fiddle flute guitar harp horn organ piano trumpet violin".split()
HOBBIES = (
    "baking chess cooking dancing drawing fishing gardening hiking knitting painting poetry reading rowing \
running sailing singing skating skiing swimming".split()
)
SCHOOL_SUBJECTS = "art biology chemistry drama geography history law mathematics medicine music philosophy \
physics".split()
MEETINGS = (
    "breakfast concert dinner exam game interview lecture lunch match meeting party picnic race review show \
talk tour visit walk wedding workshop".split()
)

# The words that case, spelling and reversing are taught with: few enough to know each by heart.
PLAIN_WORDS = sorted({*ANIMALS, *THINGS, *COLORS, *PLACES})

SYLLABLES = (
    "ba be bo bra da del do el en fa fi ga gor ha il ka kel ki la lo lu ma mi mo na ne no or pa pel ra ri ro \
sa sel ta ti to tor u va ve vi wen ya zan zo".split()
)
