/* Procedural clips: a scene is drawn from (seed, split, index) and rendered at any size.
 *
 * All arithmetic is on integers. Lengths are in units: UNIT units are one frame side, so the same
 * scene comes out at every image size. Angles count TURN steps per full turn, fractions of 256
 * blend colours. World coordinates stand still while the camera pans: screen = world - camera. */
#include <stdio.h>
#include <string.h>

#include "base/rng.h"
#include "run/data.h"

enum {
    UNIT = 16384,    /* units per frame side */
    TURN = 1024,     /* angle steps per turn */
    ONE = 16384,     /* fixed-point 1.0 of sine and cosine */
    MAX_SIDE = 4096, /* pixels: the configuration's limit for image_size */
    MAX_BODIES = 5,  /* objects apart from the beacon */
    LATTICE = 32,    /* points per side of the background's noise, which repeats */
    PAN = UNIT / 16, /* camera motion per frame while it pans */
    PAN_FRAMES = 2,  /* frames that a pan lasts */
    LIGHTS = 3,      /* light levels */
    WORD = 16
};

typedef enum Shape { DISC, BOX, TRIANGLE, SHAPES } Shape;
typedef enum Texture { STRIPES, CHECKER, SPOTS, TEXTURES } Texture;
typedef enum Motion { STRAIGHT, CIRCLING, BOUNCING, MOTIONS } Motion;
typedef enum Side { LEFT, RIGHT, UP, DOWN, SIDES } Side;

typedef struct Colour {
    char name[WORD];
    int32_t rgb[3];
} Colour;

static const Colour COLOURS[] = {
    {"red", {214, 48, 44}},     {"green", {46, 168, 72}},   {"blue", {50, 88, 214}},
    {"yellow", {230, 206, 52}}, {"purple", {148, 62, 184}}, {"orange", {236, 136, 36}},
    {"cyan", {56, 190, 206}},   {"pink", {238, 130, 178}},
};
enum { COLOUR_COUNT = sizeof COLOURS / sizeof COLOURS[0] };
static const char SHAPE_NAMES[SHAPES][WORD] = {"disc", "box", "triangle"};
static const char BEACON[] = "beacon"; /* its colour changes: both its labels are of their own */
static const char MOVING[SIDES][WORD] = {"moving left", "moving right", "moving up", "moving down"};

static const int32_t LIGHT[LIGHTS] = {112, 176, 256}; /* 256ths of the colours */

/* The beacon's core is grey until it announces, one frame ahead, what will happen. */
static const int32_t BEACON_IDLE[3] = {128, 128, 128};
static const int32_t BEACON_LIGHT[2][3] = {{0, 0, 0}, {255, 255, 255}}; /* darker, brighter */
static const int32_t BEACON_PAN[SIDES][3] = {{255, 0, 0}, {0, 255, 0}, {0, 0, 255}, {255, 255, 0}};

typedef struct Random { /* successive numbers of one stream */
    uint64_t key, index;
} Random;

typedef struct Body { /* a moving textured object */
    Shape shape;
    Texture texture;
    Motion motion;
    const Colour *colour;
    int32_t second[3];       /* the texture's other colour */
    int32_t radius, period;  /* units; period of the texture */
    int32_t x, y, vx, vy;    /* world units, and units per frame */
    int32_t orbit;           /* CIRCLING: radius about (vx, vy) */
    int32_t turn, spin;      /* place on the orbit, steps per frame */
    int32_t angle, rotation; /* of the drawn shape, steps per frame */
} Body;

typedef struct Event { /* change of the whole frame */
    size_t frame;      /* the first that shows it */
    bool pan, announced;
    Side side; /* pan: where the camera goes */
    int light; /* otherwise: the new level */
} Event;

typedef struct Scene {
    Random random;
    Body bodies[MAX_BODIES]; /* far to near */
    size_t body_count;
    Body beacon;
    uint8_t coarse[LATTICE][LATTICE], fine[LATTICE][LATTICE]; /* background noise */
    int32_t dark[3], bright[3];                               /* its two colours */
    int32_t camera[2];
    int light;
    Event event; /* the coming one, or the one under way */
} Scene;

static int32_t below(Random *r, int32_t n) {
    return (int32_t)fv_random_below(r->key, r->index++, (uint64_t)n);
}

static int32_t between(Random *r, int32_t low, int32_t high) {
    return low + below(r, high - low + 1);
}

/* sin(2 pi angle / TURN) * ONE, within 0.2 percent of ONE: Bhaskara's rational approximation. */
static int32_t sine(int32_t angle) {
    int32_t a = angle & (TURN - 1), half = TURN / 2;
    int32_t x = a & (half - 1), p = x * (half - x);
    int32_t value = (int32_t)((int64_t)ONE * 16 * p / (5 * half * half - 4 * p));
    return a < half ? value : -value;
}

static int32_t cosine(int32_t angle) {
    return sine(angle + TURN / 4);
}

static int32_t clamp(int32_t v, int32_t low, int32_t high) {
    return v < low ? low : v > high ? high : v;
}

static int32_t magnitude(int32_t v) {
    return v < 0 ? -v : v;
}

/* --- the scene at frame 0 --------------------------------------------------------------------- */

static void place_body(Random *r, Body *b, const Colour *colour) {
    *b = (Body){.shape = (Shape)below(r, SHAPES),
                .texture = (Texture)below(r, TEXTURES),
                .motion = (Motion)below(r, MOTIONS),
                .colour = colour,
                .radius = between(r, UNIT / 9, UNIT / 5)};
    int32_t shade = between(r, 40, 96); /* the second colour: the first, darker or lighter */
    bool lighter = below(r, 2);
    for (int c = 0; c < 3; c++)
        b->second[c] = lighter ? colour->rgb[c] + (255 - colour->rgb[c]) * (256 - shade) / 256
                               : colour->rgb[c] * shade / 256;
    b->period = b->radius * between(r, 2, 4) / 3;
    int32_t margin = UNIT / 8, heading = below(r, TURN), speed = between(r, UNIT / 40, UNIT / 16);
    b->x = between(r, margin, UNIT - margin);
    b->y = between(r, margin, UNIT - margin);
    b->vx = speed * cosine(heading) / ONE;
    b->vy = speed * sine(heading) / ONE;
    b->angle = heading;
    b->rotation = b->shape == TRIANGLE ? 0 : between(r, -24, 24);
    if (b->motion == BOUNCING) {
        b->y = between(r, margin, UNIT / 2);
        b->vy = 0;
    } else if (b->motion == CIRCLING) {
        b->vx = between(r, UNIT / 3, 2 * UNIT / 3);
        b->vy = between(r, UNIT / 3, 2 * UNIT / 3);
        b->orbit = between(r, UNIT / 8, UNIT / 4);
        b->turn = heading;
        b->spin = between(r, 24, 56) * (below(r, 2) ? 1 : -1);
    }
}

/* Chooses the next change of the whole frame, `after` the frame of the last one. The light moves by
 * one level, the camera stays within a quarter of a side, so that the beacon remains in view. */
static void plan_event(Scene *s, size_t after) {
    Random *r = &s->random;
    Event *e = &s->event;
    e->frame = after + (size_t)between(r, PAN_FRAMES, PAN_FRAMES + 2);
    e->pan = below(r, 2);
    e->announced = below(r, 4) != 0;
    e->side = (Side)below(r, SIDES);
    int32_t offset = s->camera[e->side >= UP];
    if (magnitude(offset) >= UNIT / 8)
        e->side = e->side >= UP ? (offset > 0 ? UP : DOWN) : (offset > 0 ? LEFT : RIGHT);
    bool brighter = s->light == 0 || (s->light < LIGHTS - 1 && below(r, 2));
    e->light = s->light + (brighter ? 1 : -1);
}

static void create_scene(uint64_t data_seed, FvSplit split, uint32_t index, Scene *s) {
    memset(s, 0, sizeof *s);
    uint64_t stream = fv_stream(data_seed, split == FV_TRAIN ? "training clips" : "held-out clips");
    s->random.key = fv_random(stream, index);
    Random *r = &s->random;
    for (int y = 0; y < LATTICE; y++) {
        for (int x = 0; x < LATTICE; x++) {
            uint64_t bits = fv_random(s->random.key, s->random.index++);
            s->coarse[y][x] = (uint8_t)bits;
            s->fine[y][x] = (uint8_t)(bits >> 8);
        }
    }
    for (int c = 0; c < 3; c++) {
        s->dark[c] = between(r, 30, 100);
        s->bright[c] = s->dark[c] + between(r, 60, 120);
    }
    int32_t order[COLOUR_COUNT]; /* every object has a colour of its own, so a caption is clear */
    for (int32_t i = 0; i < COLOUR_COUNT; i++)
        order[i] = i;
    s->body_count = (size_t)between(r, 3, MAX_BODIES);
    for (size_t i = 0; i < s->body_count; i++) {
        int32_t j = between(r, (int32_t)i, COLOUR_COUNT - 1), chosen = order[j];
        order[j] = order[i];
        place_body(r, &s->bodies[i], &COLOURS[chosen]);
    }
    s->beacon = (Body){.shape = DISC, .radius = UNIT / 11};
    s->beacon.x = between(r, 5 * UNIT / 16, 11 * UNIT / 16);
    s->beacon.y = between(r, 5 * UNIT / 16, 11 * UNIT / 16);
    s->beacon.vx = between(r, -UNIT / 30, UNIT / 30);
    s->beacon.vy = between(r, -UNIT / 30, UNIT / 30);
    s->light = below(r, LIGHTS);
    plan_event(s, 0);
}

/* --- from one frame to the next --------------------------------------------------------------- */

/* Moves one coordinate; at low and high it turns back. */
static void bounce(int32_t *x, int32_t *v, int32_t low, int32_t high) {
    *x += *v;
    if ((*x < low && *v < 0) || (*x > high && *v > 0)) {
        *x = 2 * (*x < low ? low : high) - *x;
        *v = -*v;
    }
}

static void move_body(Body *b) {
    int32_t margin = b->radius / 2;
    b->angle += b->rotation;
    if (b->motion == CIRCLING) {
        b->turn += b->spin;
        b->x = b->vx + b->orbit * cosine(b->turn) / ONE;
        b->y = b->vy + b->orbit * sine(b->turn) / ONE;
        if (b->shape == TRIANGLE) /* triangles point where they go */
            b->angle = b->turn + (b->spin > 0 ? TURN / 4 : -TURN / 4);
        return;
    }
    if (b->motion == BOUNCING)
        b->vy += UNIT / 64;
    int32_t vx = b->vx;
    bounce(&b->x, &b->vx, margin, UNIT - margin);
    if (b->shape == TRIANGLE && b->vx != vx)
        b->angle = TURN / 2 - b->angle;
    int32_t vy = b->vy;
    bounce(&b->y, &b->vy, margin, UNIT - margin);
    if (b->shape == TRIANGLE && b->vy != vy)
        b->angle = -b->angle;
}

static void advance_scene(Scene *s, size_t frame) {
    for (size_t i = 0; i < s->body_count; i++)
        move_body(&s->bodies[i]);
    bounce(&s->beacon.x, &s->beacon.vx, 5 * UNIT / 16, 11 * UNIT / 16);
    bounce(&s->beacon.y, &s->beacon.vy, 5 * UNIT / 16, 11 * UNIT / 16);
    Event *e = &s->event;
    if (frame < e->frame)
        return;
    if (e->pan)
        s->camera[e->side >= UP] += e->side == RIGHT || e->side == DOWN ? PAN : -PAN;
    else
        s->light = e->light;
    if (!e->pan || frame + 1 == e->frame + PAN_FRAMES)
        plan_event(s, frame);
}

/* --- one frame -------------------------------------------------------------------------------- */

typedef struct Canvas {
    size_t size;
    const int32_t *centre;  /* [size]: units of the pixels' centres */
    uint8_t *pixels, *mask; /* [size, size, 3], [size, size] or NULL */
} Canvas;

/* 0 .. 256 -> 0 .. 256 with flat ends, so that the noise has no creases at lattice points. */
static int32_t fade(int32_t f) {
    return f * f * (768 - 2 * f) >> 16;
}

/* Interpolates two lattice rows at world coordinate y; cell is the lattice's pitch. */
static void noise_row(const uint8_t noise[LATTICE][LATTICE], int32_t y, int32_t cell,
                      int32_t out[LATTICE + 1]) {
    y += 2 * LATTICE * cell; /* positive: the camera stays within a quarter of a side */
    const uint8_t *a = noise[y / cell % LATTICE], *b = noise[(y / cell + 1) % LATTICE];
    int32_t f = fade(y % cell * 256 / cell);
    for (int i = 0; i < LATTICE; i++)
        out[i] = a[i] * 256 + (b[i] - a[i]) * f;
    out[LATTICE] = out[0];
}

static int32_t noise_at(const int32_t row[LATTICE + 1], int32_t x, int32_t cell) {
    x += 2 * LATTICE * cell;
    int32_t i = x / cell % LATTICE, f = fade(x % cell * 256 / cell);
    return (row[i] * 256 + (row[i + 1] - row[i]) * f) >> 16;
}

static void draw_background(const Scene *s, const Canvas *to) {
    enum { COARSE = UNIT / 8, FINE = UNIT / 16 }; /* powers of two: divisions become shifts */
    int32_t coarse[LATTICE + 1], fine[LATTICE + 1];
    uint8_t *p = to->pixels;
    for (size_t y = 0; y < to->size; y++) {
        noise_row(s->coarse, to->centre[y] + s->camera[1], COARSE, coarse);
        noise_row(s->fine, to->centre[y] + s->camera[1], FINE, fine);
        for (size_t x = 0; x < to->size; x++, p += 3) {
            int32_t wx = to->centre[x] + s->camera[0];
            int32_t n = (3 * noise_at(coarse, wx, COARSE) + noise_at(fine, wx, FINE)) / 4;
            for (int c = 0; c < 3; c++)
                p[c] = (uint8_t)(s->dark[c] + (s->bright[c] - s->dark[c]) * n / 256);
        }
    }
    if (to->mask)
        memset(to->mask, 0, to->size * to->size);
}

/* Share (0 .. 256) of the texture's second colour at (u, v), in units from the object's centre. */
static int32_t texture_at(Texture texture, int32_t u, int32_t v, int32_t period) {
    int32_t pu = (u + 64 * period) % period * 256 / period; /* place within the period */
    int32_t pv = (v + 64 * period) % period * 256 / period;
    int32_t wu = magnitude(pu - 128) - 64, wv = magnitude(pv - 128) - 64; /* -64 .. 64 */
    switch (texture) {
    case STRIPES:
        return clamp(128 + wu * 8, 0, 256);
    case CHECKER:
        return 128 + clamp(wu * 8, -128, 128) * clamp(wv * 8, -128, 128) / 128;
    default:
        return clamp(128 + (80 * 80 - (pu - 128) * (pu - 128) - (pv - 128) * (pv - 128)) / 12, 0,
                     256);
    }
}

/* Units from (u, v) to the outline, positive inside; (u, v) is turned with the object. */
static int32_t depth_inside(const Body *b, int32_t u, int32_t v) {
    int32_t r = b->radius, across, along;
    switch (b->shape) {
    case DISC: /* (r^2 - d^2) / 2r equals r - d at the outline, to first order */
        return (r * r - u * u - v * v) / (2 * r);
    case BOX:
        across = r * 7 / 8 - magnitude(u);
        along = r * 5 / 8 - magnitude(v);
        return across < along ? across : along;
    default: /* equilateral, pointing to +u; 222/256 is sine of 60 degrees */
        across = r / 2 + u;
        along = r / 2 - u / 2 - magnitude(v) * 222 / 256;
        return across < along ? across : along;
    }
}

/* First and one-past-last pixel whose centre lies within reach of `middle`. */
static void pixel_range(const Canvas *to, int32_t middle, int32_t reach, size_t *from,
                        size_t *end) {
    int32_t n = (int32_t)to->size;
    *from = (size_t)clamp((int32_t)((int64_t)(middle - reach) * n / UNIT) - 1, 0, n);
    *end = (size_t)clamp((int32_t)((int64_t)(middle + reach) * n / UNIT) + 2, 0, n);
}

/* Blends the object over the canvas. The outline is one pixel soft, so that motion by less than a
 * pixel shows; the mask takes pixels covered by a half or more. core: NULL, or the beacon's. */
static void draw_body(const Scene *s, const Body *b, uint8_t id, const int32_t *core,
                      const Canvas *to) {
    int32_t sx = b->x - s->camera[0], sy = b->y - s->camera[1];
    int32_t reach = b->radius + UNIT / (int32_t)to->size;
    int32_t c = cosine(b->angle), n = sine(b->angle);
    size_t x0, x1, y0, y1;
    pixel_range(to, sx, reach, &x0, &x1);
    pixel_range(to, sy, reach, &y0, &y1);
    for (size_t y = y0; y < y1; y++) {
        for (size_t x = x0; x < x1; x++) {
            int32_t dx = to->centre[x] - sx, dy = to->centre[y] - sy;
            if (magnitude(dx) > reach || magnitude(dy) > reach)
                continue;
            int32_t u = (dx * c + dy * n) / ONE, v = (dy * c - dx * n) / ONE;
            int32_t depth = depth_inside(b, u, v);
            int32_t cover = clamp(128 + (int32_t)(depth * (int64_t)to->size * 256 / UNIT), 0, 256);
            if (cover == 0)
                continue;
            int32_t share = core ? 0 : texture_at(b->texture, u, v, b->period);
            bool ring = core && depth < b->radius / 3;
            uint8_t *p = to->pixels + (y * to->size + x) * 3;
            for (int i = 0; i < 3; i++) {
                int32_t ink =
                    core ? (ring ? (depth < b->radius / 6 ? 20 : 245) : core[i])
                         : (b->colour->rgb[i] * (256 - share) + b->second[i] * share) / 256;
                p[i] = (uint8_t)((p[i] * (256 - cover) + ink * cover) / 256);
            }
            if (to->mask && cover >= 128)
                to->mask[y * to->size + x] = id;
        }
    }
}

static const int32_t *beacon_core(const Scene *s, size_t frame) {
    const Event *e = &s->event;
    if (!e->announced || frame + 1 != e->frame)
        return BEACON_IDLE;
    return e->pan ? BEACON_PAN[e->side] : BEACON_LIGHT[e->light > s->light];
}

static void draw_frame(const Scene *s, size_t frame, const Canvas *to) {
    draw_background(s, to);
    for (size_t i = 0; i < s->body_count; i++)
        draw_body(s, &s->bodies[i], (uint8_t)(i + 1), NULL, to);
    uint8_t lit[256];
    for (int32_t v = 0; v < 256; v++)
        lit[v] = (uint8_t)(v * LIGHT[s->light] / 256);
    for (size_t i = 0; i < to->size * to->size * 3; i++)
        to->pixels[i] = lit[to->pixels[i]];
    /* the beacon shines by itself: after the light, over everything */
    draw_body(s, &s->beacon, (uint8_t)(s->body_count + 1), beacon_core(s, frame), to);
}

/* "COLOUR SHAPE MOTION" of the nearest object. */
static void write_caption(const Scene *s, char *caption, size_t caption_size) {
    const Body *b = &s->bodies[s->body_count - 1];
    const char *motion = b->motion == CIRCLING ? "circling" : "bouncing";
    if (b->motion == STRAIGHT)
        motion = MOVING[magnitude(b->vx) >= magnitude(b->vy) ? (b->vx < 0 ? LEFT : RIGHT)
                                                             : (b->vy < 0 ? UP : DOWN)];
    snprintf(caption, caption_size, "%s %s %s", b->colour->name, SHAPE_NAMES[b->shape], motion);
}

/* --- interface -------------------------------------------------------------------------------- */

const char *fv_clip_colour(size_t number) {
    return number < COLOUR_COUNT ? COLOURS[number].name : number == COLOUR_COUNT ? BEACON : NULL;
}

const char *fv_clip_shape(size_t number) {
    return number < SHAPES ? SHAPE_NAMES[number] : number == SHAPES ? BEACON : NULL;
}

static void list_objects(const Scene *s, FvClipLabels *labels) {
    _Static_assert(MAX_BODIES + 1 == FV_CLIP_OBJECTS, "the bodies and the beacon");
    memset(labels->objects, FV_NO_OBJECT, sizeof labels->objects);
    for (size_t i = 0; i < s->body_count; i++) {
        labels->objects[i][0] = (uint8_t)(s->bodies[i].colour - COLOURS);
        labels->objects[i][1] = (uint8_t)s->bodies[i].shape;
    }
    labels->objects[s->body_count][0] = COLOUR_COUNT;
    labels->objects[s->body_count][1] = SHAPES;
}

void fv_clip_draw(uint64_t data_seed, FvSplit split, uint32_t index, size_t frames, size_t size,
                  uint8_t *pixels, FvClipLabels *labels, char *caption, size_t caption_size) {
    Scene scene;
    int32_t centre[MAX_SIDE];
    create_scene(data_seed, split, index, &scene);
    if (caption)
        write_caption(&scene, caption, caption_size);
    if (labels)
        list_objects(&scene, labels);
    for (size_t i = 0; i < size; i++)
        centre[i] = (int32_t)((2 * i + 1) * UNIT / (2 * size));
    for (size_t t = 0; t < frames; t++) {
        /* circling objects take their place on the orbit by moving once before frame 0 */
        advance_scene(&scene, t);
        Canvas canvas = {size, centre, pixels + t * size * size * 3,
                         labels ? labels->masks + t * size * size : NULL};
        draw_frame(&scene, t, &canvas);
    }
}
